-- Up to which offset the tables lack nothing. A group that has passed records which these tables never got (another database, say, or one
-- that was emptied) had looked as fresh as one whose tables are whole. What an earlier version has stored is believed.

ALTER TABLE freshness_facts ADD COLUMN IF NOT EXISTS whole_to Int64 DEFAULT next_offset;

-- What a replay has filled in: the projection that runs beside it goes on writing rows of its own above.
CREATE TABLE IF NOT EXISTS whole_facts
(
    topic LowCardinality(String),
    `partition` Int32,
    whole_to Int64
)
ENGINE = ReplacingMergeTree(whole_to)
ORDER BY (topic, `partition`);

CREATE OR REPLACE VIEW freshness AS
SELECT
    f.topic AS topic, f.`partition` AS `partition`, f.next_offset AS next_offset,
    greatest(f.end_offset - f.next_offset, 0) AS lag,
    greatest(f.whole_to, w.whole_to) AS whole_to,
    greatest(f.next_offset - greatest(f.whole_to, w.whole_to), 0) AS missing,
    fromUnixTimestamp64Milli(f.last_event_ms, 'UTC') AS last_event_at,
    fromUnixTimestamp64Milli(f.written_ms, 'UTC') AS written_at
FROM (SELECT * FROM freshness_facts FINAL) AS f
LEFT ANY JOIN (SELECT * FROM whole_facts FINAL) AS w ON w.topic = f.topic AND w.`partition` = f.`partition`;
