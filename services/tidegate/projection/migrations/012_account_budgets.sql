-- A bucket is billed to the path that its budget counts for, not to the accounts below it that take from it; and a window that never
-- turns has no end.

CREATE OR REPLACE VIEW account_budgets AS
SELECT
    JSONExtractString(body, 'bucket') AS bucket,
    argMaxIf(f.account, f.seq, type = 'BudgetSet') AS account,
    argMaxIf(JSONExtractString(body, 'budget'), f.seq, type = 'BudgetSet') AS budget,
    argMaxIf(JSONExtractString(body, 'version'), f.seq, type = 'BudgetSet') AS version,
    argMaxIf(JSONExtract(body, 'limits', 'micros', 'Nullable(Int64)'), f.seq, type = 'BudgetSet') AS limit_micros,
    sumIf(JSONExtractInt(body, 'amounts', 'micros'), type = 'BudgetReserved')
        - sumIf(JSONExtractInt(body, 'reserved', 'micros'), type = 'BudgetSettled') AS reserved_micros,
    sumIf(JSONExtractInt(body, 'used', 'micros'), type = 'BudgetSettled') AS spent_micros,
    argMaxIf(JSONExtractString(body, 'on_exceed'), f.seq, type = 'BudgetSet') AS on_exceed,
    maxIf(fromUnixTimestamp64Milli(JSONExtractInt(body, 'from_ms'), 'UTC'), type = 'BudgetSet') AS from_at,
    maxIf(
        toNullable(fromUnixTimestamp64Milli(JSONExtractInt(body, 'until_ms'), 'UTC')),
        type = 'BudgetSet' AND JSONExtractInt(body, 'until_ms') > 0
    ) AS until_at,
    countIf(type = 'BudgetClosed') > 0 AS is_closed,
    max(at) AS last_at
FROM ledger_facts AS f FINAL
WHERE type IN ('BudgetSet', 'BudgetReserved', 'BudgetSettled', 'BudgetClosed')
GROUP BY bucket;
