-- Facts: one row per event of the two logs, as the log has it. Everything that people look at is derived from facts, in SQL.
-- A fact's identity is its subject and seq, and its content is a function of the log alone, so a row that is inserted twice is
-- the same row, and ReplacingMergeTree keeps one. The version column matters only in a log that breaks its own rules (two
-- valid events with one identity): then the later record wins, whatever the order of insertion.

CREATE TABLE IF NOT EXISTS event_facts
(
    run_id String,
    seq Int64,
    `partition` Int32,
    `offset` Int64,
    epoch Int64,
    at_ms Int64 EPHEMERAL,
    at DateTime64(3, 'UTC') DEFAULT fromUnixTimestamp64Milli(at_ms, 'UTC'),
    account LowCardinality(String),
    type LowCardinality(String),
    step_id String,
    attempt Int64,
    actual_micros Int64,
    cause String,
    body String CODEC(ZSTD(1))
)
ENGINE = ReplacingMergeTree(`offset`)
PARTITION BY toYYYYMM(at)
ORDER BY (run_id, seq);

CREATE TABLE IF NOT EXISTS ledger_facts
(
    ledger Int32,
    seq Int64,
    `offset` Int64,
    epoch Int64,
    at_ms Int64 EPHEMERAL,
    at DateTime64(3, 'UTC') DEFAULT fromUnixTimestamp64Milli(at_ms, 'UTC'),
    type LowCardinality(String),
    account LowCardinality(String),
    run_id String,
    step_id String,
    attempt Int64,
    budget_micros Nullable(Int64),
    reserved_micros Int64,
    actual_micros Int64,
    overshoot_micros Int64,
    cause String,
    body String CODEC(ZSTD(1))
)
ENGINE = ReplacingMergeTree(`offset`)
PARTITION BY toYYYYMM(at)
ORDER BY (ledger, seq);

-- What people query: deduplicated, whatever the state of background merges.

CREATE VIEW IF NOT EXISTS events AS
SELECT run_id, seq, at, type, step_id, attempt, actual_micros, account, cause, `partition`, `offset`, epoch, body
FROM event_facts FINAL;

CREATE VIEW IF NOT EXISTS ledger AS
SELECT
    ledger, seq, at, type, account, run_id, step_id, attempt, budget_micros, reserved_micros, actual_micros, overshoot_micros,
    cause, `offset`, epoch, body
FROM ledger_facts FINAL;
