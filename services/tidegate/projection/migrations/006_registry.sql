-- Latest-value topics: the row with the highest offset of its key stays, which is also the record that compaction keeps.

CREATE TABLE IF NOT EXISTS instance_facts
(
    instance_id String,
    `offset` Int64,
    removed Bool,
    service LowCardinality(String),
    incarnation Int64,
    state LowCardinality(String),
    host String,
    pid Int64,
    queue String,
    slots Int64,
    free_slots Int64,
    running Int64,
    functions Array(String),
    version String,
    started_ms Int64,
    at_ms Int64,
    body String CODEC(ZSTD(1))
)
ENGINE = ReplacingMergeTree(`offset`)
ORDER BY instance_id;

CREATE VIEW IF NOT EXISTS instances AS
SELECT
    instance_id, service, incarnation, state, host, pid, queue, slots, free_slots, running, functions, version,
    fromUnixTimestamp64Milli(started_ms, 'UTC') AS started_at,
    fromUnixTimestamp64Milli(at_ms, 'UTC') AS heartbeat_at,
    body
FROM instance_facts FINAL
WHERE NOT removed;

CREATE TABLE IF NOT EXISTS dead_letter_facts
(
    topic LowCardinality(String),
    `partition` Int32,
    `offset` Int64,
    letter_offset Int64,
    removed Bool,
    service LowCardinality(String),
    code LowCardinality(String),
    reason String,
    run_id String,
    original_base64 String CODEC(ZSTD(1)),
    original_size Int64,
    key_base64 String,
    headers String,
    at_ms Int64
)
ENGINE = ReplacingMergeTree(letter_offset)
ORDER BY (topic, `partition`, `offset`);

-- Text for people; the exact bytes are in `original_base64`.
CREATE VIEW IF NOT EXISTS dead_letters AS
SELECT
    topic, `partition`, `offset`, service, code, reason, run_id,
    toValidUTF8(base64Decode(d.original_base64)) AS original,
    original_base64,
    original_size,
    toValidUTF8(base64Decode(key_base64)) AS original_key,
    mapApply((name, value) -> (name, toValidUTF8(base64Decode(value))), JSONExtract(d.headers, 'Map(String, String)')) AS headers,
    fromUnixTimestamp64Milli(at_ms, 'UTC') AS at
FROM dead_letter_facts AS d FINAL
WHERE NOT removed;
