-- How far the projection is, per topic partition: the only rows that depend on when they were written.

CREATE TABLE IF NOT EXISTS freshness_facts
(
    topic LowCardinality(String),
    `partition` Int32,
    next_offset Int64,
    end_offset Int64,
    last_event_ms Nullable(Int64),
    written_ms Int64
)
ENGINE = ReplacingMergeTree(written_ms)
ORDER BY (topic, `partition`);

CREATE VIEW IF NOT EXISTS freshness AS
SELECT
    topic, `partition`, next_offset,
    greatest(end_offset - next_offset, 0) AS lag,
    fromUnixTimestamp64Milli(last_event_ms, 'UTC') AS last_event_at,
    fromUnixTimestamp64Milli(written_ms, 'UTC') AS written_at
FROM freshness_facts FINAL;

-- Records of our own topics that this projection could not read: nothing is skipped silently. `at` is when Kafka got the record.
CREATE TABLE IF NOT EXISTS unreadable_facts
(
    topic LowCardinality(String),
    `partition` Int32,
    `offset` Int64,
    reason String,
    size Int64,
    at_ms Int64
)
ENGINE = ReplacingMergeTree
ORDER BY (topic, `partition`, `offset`);

CREATE VIEW IF NOT EXISTS unreadable AS
SELECT topic, `partition`, `offset`, reason, size, fromUnixTimestamp64Milli(at_ms, 'UTC') AS at
FROM unreadable_facts FINAL;
