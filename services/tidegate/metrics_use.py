"""What each metric is there for: questions, and what to ask Prometheus. Made into a part of `docs/metrics.md`; nothing runs it.

A test holds that no metric is without a question, and that what is asked names metrics and labels that there are.
"""

from __future__ import annotations

from typing import Final

# question -> what to ask; several, if the answer is in their comparison.
USES: Final[dict[str, tuple[str, ...]]] = {
    "Is everything there, and of one version?": (
        "min by (service, pod) (tidegate_ready)",
        "count by (version) (tidegate_build_info)",
    ),
    "Do runs start, and are requests refused at the door?": (
        "sum(rate(tidegate_admission_requests_total[5m]))",
        "sum by (code) (rate(tidegate_admission_refused_total[5m]))",
        "increase(tidegate_admission_deleted_unread_total[1h])",
    ),
    "What happens, how often, and what is refused?": (
        "sum by (type) (rate(tidegate_events_total[5m]))",
        "sum by (code) (rate(tidegate_refusals_total[5m]))",
        "sum by (topic, code) (increase(tidegate_dead_letters_total[1h]))",
    ),
    "How many runs are under way, and what is waited for?": (
        "sum by (status) (tidegate_scheduler_runs)",
        "sum(tidegate_scheduler_timers)",
        "sum by (status) (tidegate_gate_attempts)",
        "sum(tidegate_gate_open_runs)",
    ),
    "Is a loop too slow for what comes in? Long turns with few messages are slow; many messages a turn are load.": (
        "histogram_quantile(0.99, sum by (le, service) (rate(tidegate_turn_seconds_bucket[5m])))",
        "histogram_quantile(0.5, sum by (le, service) (rate(tidegate_turn_messages_bucket[5m])))",
        "sum by (topic) (tidegate_input_lag_messages)",
        "sum by (topic) (rate(tidegate_messages_total[5m]))",
    ),
    "Does an owner keep up with telling what it logged? A distance that grows is a broker that is slow to acknowledge.": (
        "max by (service, partition) (tidegate_told_distance_records)",
        "sum by (service) (rate(tidegate_tells_total[5m])) / sum by (service) (rate(tidegate_entries_total[5m]))",
    ),
    "Who owns what, and does it change hands?": (
        "sum by (service, pod) (tidegate_partitions_owned)",
        "max by (service, partition) (tidegate_partition_epoch)",
        "sum by (reason) (increase(tidegate_partitions_dropped_total[1h]))",
        "increase(tidegate_takeovers_total[1h])",
    ),
    "How long does a restart take, and how far is one that goes on?": (
        "histogram_quantile(0.99, sum by (le, service) (rate(tidegate_takeover_seconds_bucket[1h])))",
        "min by (service) (tidegate_restore_progress_ratio)",
        "max by (service) (tidegate_entries_since_checkpoint)",
        "sum by (service) (tidegate_units_in_memory)",
    ),
    "What does the gate decide, and does it stand still about something?": (
        "sum by (decision) (rate(tidegate_gate_decisions_total[5m]))",
        "sum by (about) (increase(tidegate_gate_undecided_total[10m]))",
    ),
    "How much money is set aside, and which budget is nearly gone?": (
        "sum(tidegate_gate_reserved_micros) / 1e6",
        "bottomk(5, min by (budget) (tidegate_gate_budget_left_ratio))",
    ),
    "Are there executors enough? More that waits than slots are free for long: start more of that queue.": (
        "sum by (queue) (tidegate_gate_waiting_attempts)",
        "sum by (queue) (tidegate_gate_free_slots)",
        "sum by (queue) (tidegate_gate_executors)",
        "sum(tidegate_executor_slots) - sum(tidegate_executor_free_slots)",
    ),
    "Do functions fail or take long?": (
        "sum by (outcome) (rate(tidegate_executor_attempts_total[5m]))",
        "histogram_quantile(0.95, sum by (le) (rate(tidegate_executor_attempt_seconds_bucket[5m])))",
    ),
    "Is an executor about to lose its work? A lease near 0 is a broker that does not acknowledge heartbeats.": (
        "min by (pod) (tidegate_executor_lease_remaining_seconds)",
        "max by (pod) (tidegate_executor_unanswered_attempts)",
    ),
    "How old is what the dashboards show, and is it whole?": (
        "sum by (topic) (tidegate_projection_lag_records)",
        "sum by (topic) (tidegate_projection_missing_offsets)",
        "time() - max by (topic) (tidegate_projection_last_event_timestamp_seconds)",
        "sum(increase(tidegate_projection_unreadable_total[1h]))",
    ),
    "Does ClickHouse keep up?": (
        "max(tidegate_projection_insert_failing)",
        "max(tidegate_projection_paused)",
        "histogram_quantile(0.99, sum by (le) (rate(tidegate_projection_insert_seconds_bucket[5m])))",
        "sum(rate(tidegate_projection_rows_total[5m]))",
    ),
    "How fast is a rebuild, and how far is a replay?": (
        "sum(rate(tidegate_projection_events_total[1m]))",
        "sum(rate(tidegate_projection_messages_total[1m]))",
        "max(tidegate_projection_replay_progress_ratio)",
    ),
    "Has somebody written to a log whose time was over? Void entries are harmless, and seldom.": (
        "sum(increase(tidegate_projection_void_entries_total[1h]))",
        "sum(increase(tidegate_gateway_void_entries_total[1h]))",
    ),
    "Is the live view whole, shared and backed up? Partitions of all gateways add up to those of run-events.": (
        "sum(tidegate_gateway_partitions)",
        "sum(tidegate_gateway_standby_partitions)",
        "max(tidegate_gateway_restore_lag_records)",
        "sum(increase(tidegate_gateway_unreadable_total[1h]))",
    ),
    "How large is the live view, and how fast does it answer? It keeps TIDEGATE_GATEWAY_KEEP_H hours.": (
        "sum(tidegate_gateway_runs)",
        "sum(tidegate_gateway_tallies)",
        "histogram_quantile(0.99, sum by (le, path) (rate(tidegate_gateway_request_seconds_bucket[5m])))",
        "sum(rate(tidegate_gateway_known_entries_total[5m])) / sum(rate(tidegate_gateway_entries_total[5m]))",
    ),
}
