"""Every metric there is, declared once: what services export under `/metrics`, and what `docs/metrics.md` is made of.

Names end in their unit. A label has few values, whatever users send: topics, partitions, types of our own events, codes of our
own refusals; never a run, a function or an account. What a loop does is counted in plain numbers and handed over here once a
turn or less often (`eventlog/loop_meter.py`), so the hot path pays for none of this per message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

SERVICES: Final = ("scheduler", "gate", "executor", "projection", "gateway")
OWNERS: Final = ("scheduler", "gate")
MAX_LABEL_VALUES: Final = 50
OTHER: Final = "other"

_TURN_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_LONG_BUCKETS: Final = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800)
_SIZE_BUCKETS: Final = (1, 10, 100, 500, 1_000, 5_000, 10_000, 50_000)

_M = TypeVar("_M", bound=MetricWrapperBase)


class Declared(NamedTuple):
    """A metric as the reference shows it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str
    services: tuple[str, ...]


REGISTRIES: Final = {service: CollectorRegistry() for service in SERVICES}
DECLARED: Final[list[Declared]] = []
_shown: Final[dict[Gauge, set[str]]] = {}


def _declare(kind: str, metric: _M, name: str, labels: tuple[str, ...], text: str, services: tuple[str, ...]) -> _M:
    DECLARED.append(Declared(name, kind, labels, text, services))
    for service in services:
        REGISTRIES[service].register(metric)
    return metric


def _counter(services: tuple[str, ...], name: str, text: str, *labels: str) -> Counter:
    return _declare("counter", Counter(name, text, labels, registry=None), name, labels, text, services)


def _gauge(services: tuple[str, ...], name: str, text: str, *labels: str) -> Gauge:
    return _declare("gauge", Gauge(name, text, labels, registry=None), name, labels, text, services)


def _histogram(
    services: tuple[str, ...], name: str, text: str, *labels: str, buckets: tuple[float, ...] = _TURN_BUCKETS
) -> Histogram:
    metric = Histogram(name, text, labels, registry=None, buckets=buckets)
    return _declare("histogram", metric, name, labels, text, services)


def set_by_label(gauge: Gauge, values: Mapping[str, float], *, keep_least: bool = False) -> None:
    """Set a gauge with one label to these values and no others; those that are too many are summed up as `other`.

    keep_least: the smallest values are those that matter, and sums of them mean nothing; `other` is the next one.
    """
    ordered = sorted(values, key=lambda name: (values[name] if keep_least else -values[name], name))
    wanted = {name: values[name] for name in ordered[:MAX_LABEL_VALUES]}
    rest = [values[name] for name in ordered[MAX_LABEL_VALUES:]]
    if rest:
        wanted[OTHER] = rest[0] if keep_least else wanted.get(OTHER, 0) + sum(rest)
    for gone in _shown.get(gauge, set()) - wanted.keys():
        gauge.remove(gone)
    _shown[gauge] = set(wanted)
    for name, value in wanted.items():
        gauge.labels(name).set(value)


# --- every service ------------------------------------------------------------------------------------------------------

build_info = _gauge(SERVICES, "tidegate_build_info", "Always 1; the labels say what runs.", "version", "instance_id")
ready = _gauge(SERVICES, "tidegate_ready", "1 while `/health/ready` says so, else 0.")
turn_seconds = _histogram(
    (*OWNERS, "projection"),
    "tidegate_turn_seconds",
    "How long a turn of the main loop took that had something to do, without waiting for input.",
)

# --- scheduler and gate: the owner loop -------------------------------------------------------------------------------------

turn_messages = _histogram(
    (*OWNERS, "projection"), "tidegate_turn_messages", "Messages that one poll brought, if any.", buckets=_SIZE_BUCKETS
)
messages = _counter(OWNERS, "tidegate_messages_total", "Messages read, by topic.", "topic")
entries = _counter(OWNERS, "tidegate_entries_total", "Entries logged and acknowledged.")
events = _counter(OWNERS, "tidegate_events_total", "Events in these entries, by type.", "type")
refusals = _counter(
    OWNERS, "tidegate_refusals_total", "Refusals among these events (runs, commands, attempts), by code.", "code"
)
tells = _counter(OWNERS, "tidegate_tells_total", "Messages told to other services, those told again included.")
dead_letters = _counter(
    OWNERS, "tidegate_dead_letters_total", "Inputs that became dead letters, by topic and code.", "topic", "code"
)
takeovers = _counter(OWNERS, "tidegate_takeovers_total", "Partitions taken over since the start.")
partitions_dropped = _counter(
    OWNERS,
    "tidegate_partitions_dropped_total",
    "Partitions given up: `rebalance` because the group gave them to another, `doubt` because somebody else wrote.",
    "reason",
)
takeover_seconds = _histogram(
    OWNERS, "tidegate_takeover_seconds", "From the announcement to the first input.", buckets=_LONG_BUCKETS
)
restore_progress = _gauge(
    OWNERS,
    "tidegate_restore_progress_ratio",
    "How much of the log is folded, while a restore runs; then 1.",
    "partition",
)
partitions_owned = _gauge(OWNERS, "tidegate_partitions_owned", "Partitions of the log that this process owns.")
partition_epoch = _gauge(OWNERS, "tidegate_partition_epoch", "The epoch under which it owns a partition.", "partition")
input_lag = _gauge(
    OWNERS, "tidegate_input_lag_messages", "Messages of an input that are not read yet.", "topic", "partition"
)
told_distance = _gauge(
    OWNERS,
    "tidegate_told_distance_records",
    "Records at the end of the log whose tells are not all acknowledged: what a successor would tell again.",
    "partition",
)
units_in_memory = _gauge(OWNERS, "tidegate_units_in_memory", "Runs whose state is in memory.", "partition")
since_checkpoint = _gauge(
    OWNERS,
    "tidegate_entries_since_checkpoint",
    "Entries logged since the last checkpoint began; one of several inputs counts as several.",
    "partition",
)

# --- scheduler ----------------------------------------------------------------------------------------------------------

scheduler_runs = _gauge(("scheduler",), "tidegate_scheduler_runs", "Runs in memory, by status.", "status")
scheduler_timers = _gauge(("scheduler",), "tidegate_scheduler_timers", "Back-offs and other times that are waited for.")
admitted = _counter(("scheduler",), "tidegate_admission_requests_total", "Requests read from the inbox.")
admission_refused = _counter(
    ("scheduler",), "tidegate_admission_refused_total", "Requests that became dead letters, by code.", "code"
)
admission_deleted = _counter(
    ("scheduler",),
    "tidegate_admission_deleted_unread_total",
    "Offsets of the inbox that retention deleted before admission read them: at most so many requests are lost.",
)

# --- gate ---------------------------------------------------------------------------------------------------------------

gate_decisions = _counter(
    ("gate",), "tidegate_gate_decisions_total", "Decisions by kind: allow, deny, require_approval, ...", "decision"
)
gate_undecided = _counter(
    ("gate",),
    "tidegate_gate_undecided_total",
    "Times that something due could not be decided, by what; see the log.",
    "about",
)
gate_attempts = _gauge(
    ("gate",),
    "tidegate_gate_attempts",
    "Open attempts by how they stand: held for a human, queued for a slot, reserved, placed.",
    "status",
)
gate_waiting = _gauge(("gate",), "tidegate_gate_waiting_attempts", "Attempts that wait for a free slot.", "queue")
gate_runs = _gauge(("gate",), "tidegate_gate_open_runs", "Runs whose money is open.")
gate_reserved = _gauge(("gate",), "tidegate_gate_reserved_micros", "Micro-dollars set aside for open attempts.")
gate_budget_left = _gauge(
    ("gate",),
    "tidegate_gate_budget_left_ratio",
    "How much is left of what a budget limits, at the account where least is; below 0 if more was spent. Not of single runs.",
    "budget",
)
gate_executors = _gauge(("gate",), "tidegate_gate_executors", "Executors that are ready, by queue.", "queue")
gate_free_slots = _gauge(("gate",), "tidegate_gate_free_slots", "Slots that are free there, by queue.", "queue")

# --- executor -----------------------------------------------------------------------------------------------------------

executor_slots = _gauge(("executor",), "tidegate_executor_slots", "Attempts that it can run at the same time.")
executor_free_slots = _gauge(("executor",), "tidegate_executor_free_slots", "Of these, how many are free now.")
executor_unanswered = _gauge(
    ("executor",), "tidegate_executor_unanswered_attempts", "Attempts taken whose answer is not acknowledged yet."
)
executor_attempts = _counter(
    ("executor",), "tidegate_executor_attempts_total", "Attempts answered, by outcome.", "outcome"
)
executor_attempt_seconds = _histogram(
    ("executor",),
    "tidegate_executor_attempt_seconds",
    "How long functions ran, by outcome.",
    "outcome",
    buckets=_LONG_BUCKETS,
)
executor_lease = _gauge(
    ("executor",),
    "tidegate_executor_lease_remaining_seconds",
    "Until the lease runs out if no heartbeat is acknowledged.",
)

# --- projection ---------------------------------------------------------------------------------------------------------

projection_messages = _counter(("projection",), "tidegate_projection_messages_total", "Records read.")
projection_events = _counter(("projection",), "tidegate_projection_events_total", "Valid events of the two logs.")
projection_rows = _counter(("projection",), "tidegate_projection_rows_total", "Rows made of records.")
projection_void = _counter(
    ("projection",), "tidegate_projection_void_entries_total", "Entries of epochs that were not in force: no rows."
)
projection_unreadable = _counter(
    ("projection",), "tidegate_projection_unreadable_total", "Records that gave no rows; see the table `unreadable`."
)
projection_lag = _gauge(
    ("projection",), "tidegate_projection_lag_records", "Records that are not inserted yet.", "topic", "partition"
)
projection_missing = _gauge(
    ("projection",),
    "tidegate_projection_missing_offsets",
    "Offsets that the group has passed and that the tables never got: `tidegate replay projection` fills them in.",
    "topic",
    "partition",
)
projection_age = _gauge(
    ("projection",),
    "tidegate_projection_last_event_timestamp_seconds",
    "When the last event was decided that was handed to ClickHouse, as Unix time.",
    "topic",
)
projection_insert_seconds = _histogram(
    ("projection",),
    "tidegate_projection_insert_seconds",
    "Inserting one batch, retries included.",
    buckets=_LONG_BUCKETS,
)
projection_failing = _gauge(
    ("projection",), "tidegate_projection_insert_failing", "1 while ClickHouse does not take the batch under way."
)
projection_paused = _gauge(
    ("projection",), "tidegate_projection_paused", "1 while reading pauses because ClickHouse is slower than the log."
)
projection_replay = _gauge(
    ("projection",),
    "tidegate_projection_replay_progress_ratio",
    "How much of the log a replay beside the projection has read; -1 if none is under way.",
)

# --- gateway ------------------------------------------------------------------------------------------------------------

gateway_entries = _counter(("gateway",), "tidegate_gateway_entries_total", "Valid entries folded into the live view.")
gateway_known = _counter(("gateway",), "tidegate_gateway_known_entries_total", "Entries that the view held already.")
gateway_void = _counter(
    ("gateway",), "tidegate_gateway_void_entries_total", "Entries of epochs that were not in force."
)
gateway_unreadable = _counter(("gateway",), "tidegate_gateway_unreadable_total", "Records that could not be read.")
gateway_runs = _gauge(("gateway",), "tidegate_gateway_runs", "Runs in this gateway's part of the live view.")
gateway_partitions = _gauge(
    ("gateway",), "tidegate_gateway_partitions", "Partitions of run-events that it answers for."
)
gateway_tallies = _gauge(
    ("gateway",), "tidegate_gateway_tallies", "Hours of accounts and functions in this gateway's part of the live view."
)
gateway_standby_partitions = _gauge(
    ("gateway",), "tidegate_gateway_standby_partitions", "Partitions that it keeps a copy of for another gateway."
)
gateway_restore_lag = _gauge(
    ("gateway",), "tidegate_gateway_restore_lag_records", "Records left of those that were there at the restore."
)
gateway_request_seconds = _histogram(
    ("gateway",),
    "tidegate_gateway_request_seconds",
    "Answering a request, by path; without what it was asked to wait.",
    "path",
)
