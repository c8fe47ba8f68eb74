-- What buckets of budgets hold follows from the events of attempts: one says it for all buckets. Older ledgers say it for each.

CREATE OR REPLACE VIEW account_budgets AS
SELECT
    bucket,
    argMaxIf(b.account, b.seq, type = 'BudgetSet') AS account,
    argMaxIf(JSONExtractString(said, 'budget'), b.seq, type = 'BudgetSet') AS budget,
    argMaxIf(JSONExtractString(said, 'version'), b.seq, type = 'BudgetSet') AS version,
    argMaxIf(JSONExtract(said, 'limits', 'micros', 'Nullable(Int64)'), b.seq, type = 'BudgetSet') AS limit_micros,
    sumIf(b.amounts.amounts.micros, type IN ('AttemptReserved', 'BudgetReserved'))
        - sumIf(b.amounts.amounts.micros, type = 'BudgetsReleased')
        - sumIf(b.amounts.set_aside.micros, type = 'AttemptSettled')
        - sumIf(b.amounts.reserved.micros, type = 'BudgetSettled') AS reserved_micros,
    sumIf(actual_micros, type = 'AttemptSettled') + sumIf(b.amounts.used.micros, type = 'BudgetSettled') AS spent_micros,
    argMaxIf(JSONExtractString(said, 'on_exceed'), b.seq, type = 'BudgetSet') AS on_exceed,
    maxIf(fromUnixTimestamp64Milli(JSONExtractInt(said, 'from_ms'), 'UTC'), type = 'BudgetSet') AS from_at,
    maxIf(
        toNullable(fromUnixTimestamp64Milli(JSONExtractInt(said, 'until_ms'), 'UTC')),
        type = 'BudgetSet' AND JSONExtractInt(said, 'until_ms') > 0
    ) AS until_at,
    countIf(type = 'BudgetClosed') > 0 AS is_closed,
    max(at) AS last_at
FROM (
    SELECT
        type, account, seq, at, actual_micros,
        JSONExtract(
            body,
            'Tuple(bucket String, buckets Array(String), counts Bool, amounts Tuple(micros Int64), set_aside Tuple(micros Int64), '
            || 'reserved Tuple(micros Int64), used Tuple(micros Int64))'
        ) AS amounts,
        arrayJoin(
            multiIf(
                type = 'AttemptReserved', if(amounts.counts, amounts.buckets, []),
                type IN ('AttemptSettled', 'BudgetsReleased'), amounts.buckets,
                [amounts.bucket]
            )
        ) AS bucket,
        if(type = 'BudgetSet', body, '') AS said
    FROM ledger_facts FINAL
    WHERE type IN (
        'AttemptReserved', 'AttemptSettled', 'BudgetsReleased', 'BudgetSet', 'BudgetReserved', 'BudgetSettled', 'BudgetClosed'
    )
) AS b
GROUP BY bucket;
