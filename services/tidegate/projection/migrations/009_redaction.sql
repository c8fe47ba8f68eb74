-- Where a policy's decision says `redact`, the ledger's rows come without those values (`redaction.py`). The run's own events were
-- written before the decision, so their tables have the values; the views show what the decision left of them instead.
-- On a server, give people the views and not the tables whose names end with _facts or _state.

CREATE TABLE IF NOT EXISTS redaction_state
(
    run_id String,
    step_id String,
    updated_at SimpleAggregateFunction(max, DateTime64(3, 'UTC')),
    arguments SimpleAggregateFunction(max, String)
)
ENGINE = AggregatingMergeTree
ORDER BY (run_id, step_id);

CREATE MATERIALIZED VIEW IF NOT EXISTS redaction_state_of_ledger TO redaction_state AS
SELECT
    run_id,
    step_id,
    max(at) AS updated_at,
    max(JSONExtractString(body, 'call', 'arguments')) AS arguments
FROM ledger_facts
WHERE step_id != '' AND JSONLength(body, 'redact') > 0
GROUP BY run_id, step_id;

-- An event whose text cannot be cut exactly is hidden as a whole.
CREATE OR REPLACE VIEW events AS
SELECT
    run_id, seq, at, type, step_id, attempt, actual_micros, account, cause, `partition`, `offset`, epoch,
    multiIf(
        NOT JSONHas(f.body, 'call', 'arguments') OR (run_id, step_id) NOT IN (SELECT run_id, step_id FROM redaction_state), f.body,
        replaceOne(
            f.body, concat('"arguments":', JSONExtractRaw(f.body, 'call', 'arguments')), '"arguments":"(redacted)"'
        ) AS cut != f.body, cut,
        '"(redacted)"'
    ) AS body
FROM event_facts AS f FINAL;

CREATE OR REPLACE VIEW ledger AS
SELECT
    ledger, seq, at, type, account, run_id, step_id, attempt, budget_micros, reserved_micros, actual_micros, overshoot_micros,
    cause, `offset`, epoch,
    multiIf(
        NOT JSONHas(f.body, 'call', 'arguments') OR JSONLength(f.body, 'redact') > 0
            OR (run_id, step_id) NOT IN (SELECT run_id, step_id FROM redaction_state), f.body,
        replaceOne(
            f.body, concat('"arguments":', JSONExtractRaw(f.body, 'call', 'arguments')), '"arguments":"(redacted)"'
        ) AS cut != f.body, cut,
        '"(redacted)"'
    ) AS body
FROM ledger_facts AS f FINAL;
