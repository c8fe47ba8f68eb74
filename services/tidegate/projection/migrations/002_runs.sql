-- A run changes with every event. Its row is not written by the projection, which would need the run's state for it, but
-- merged by ClickHouse from what each event says alone. All aggregates are idempotent and independent of order (max, min,
-- maxMap over keys that name what is counted), so events that arrive twice, late or in another order give the same row.
-- What the latest event decides (`status`) is a maximum, too: 19 digits of the event's seq, then the value. Not a tuple: where
-- only one element of a tuple is read (`status.name`), FINAL merges that element alone, without the seq that it belongs to.
-- `costs` maps an attempt (a hash of step and number) to what it cost.

CREATE TABLE IF NOT EXISTS run_state
(
    run_id String,
    account SimpleAggregateFunction(max, String),
    log_partition SimpleAggregateFunction(max, Int32),
    last_seq SimpleAggregateFunction(max, Int64),
    updated_at SimpleAggregateFunction(max, DateTime64(3, 'UTC')),
    status SimpleAggregateFunction(max, String),
    workflow SimpleAggregateFunction(max, String),
    definition_hash SimpleAggregateFunction(max, String),
    input SimpleAggregateFunction(max, String),
    budget_micros SimpleAggregateFunction(max, Nullable(Int64)),
    tags SimpleAggregateFunction(max, String),
    output SimpleAggregateFunction(max, String),
    code SimpleAggregateFunction(max, String),
    reason SimpleAggregateFunction(max, String),
    fingerprint SimpleAggregateFunction(max, String),
    cancelled_by SimpleAggregateFunction(max, String),
    started_at SimpleAggregateFunction(min, Nullable(DateTime64(3, 'UTC'))),
    finished_at SimpleAggregateFunction(max, Nullable(DateTime64(3, 'UTC'))),
    costs SimpleAggregateFunction(maxMap, Map(UInt64, Int64))
)
ENGINE = AggregatingMergeTree
ORDER BY run_id;

CREATE MATERIALIZED VIEW IF NOT EXISTS run_state_of_events TO run_state AS
SELECT
    run_id,
    max(f.account) AS account,
    max(`partition`) AS log_partition,
    max(seq) AS last_seq,
    max(at) AS updated_at,
    max(if((multiIf(
        type = 'RunStarted', 'running',
        type = 'RunRefused', 'refused',
        type = 'RunFinished', JSONExtractString(body, 'status'),
        ''
    ) AS name) = '', '', concat(leftPad(toString(seq), 19, '0'), name))) AS status,
    max(if(type = 'RunStarted', JSONExtractString(body, 'workflow'), '')) AS workflow,
    max(if(type = 'RunStarted', JSONExtractString(body, 'definition_hash'), '')) AS definition_hash,
    max(if(type = 'RunStarted', JSONExtractString(body, 'input'), '')) AS input,
    max(if(type = 'RunStarted', JSONExtract(body, 'budget_micros', 'Nullable(Int64)'), NULL)) AS budget_micros,
    max(if(type = 'RunStarted', JSONExtractRaw(body, 'tags'), '')) AS tags,
    max(if(type = 'RunFinished', JSONExtractString(body, 'output'), '')) AS output,
    max(if(type IN ('RunFinished', 'RunRefused'), JSONExtractString(body, 'code'), '')) AS code,
    max(if(type IN ('RunFinished', 'RunRefused'), JSONExtractString(body, 'reason'), '')) AS reason,
    max(if(type = 'RunFinished', JSONExtractString(body, 'fingerprint'), '')) AS fingerprint,
    max(if(type = 'RunCancelRequested', JSONExtractString(body, 'by'), '')) AS cancelled_by,
    minIf(toNullable(at), type IN ('RunStarted', 'RunRefused')) AS started_at,
    maxIf(toNullable(at), type IN ('RunFinished', 'RunRefused')) AS finished_at,
    maxMap(if(f.actual_micros = 0, CAST(map(), 'Map(UInt64, Int64)'), map(cityHash64(step_id, attempt), f.actual_micros))) AS costs
FROM event_facts AS f
GROUP BY run_id;
