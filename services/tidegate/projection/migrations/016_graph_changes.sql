-- Changes of the graphs of running runs: what steps proposed, agents' plans included, and what became of it.

CREATE VIEW IF NOT EXISTS graph_changes AS
SELECT
    run_id,
    step_id,
    any(f.account) AS account,
    anyIf(JSONExtractString(body, 'node_id'), type = 'GraphChangeProposed') AS node_id,
    anyIf(JSONExtractString(body, 'kind'), type = 'GraphChangeProposed') AS kind,
    multiIf(
        countIf(type = 'GraphChangeAccepted') > 0 AND countIf(type = 'GraphChangeRejected') > 0, 'in part',
        countIf(type = 'GraphChangeAccepted') > 0, 'accepted',
        countIf(type = 'GraphChangeRejected') > 0, 'rejected',
        countIf(type = 'StepCancelled') > 0, 'withdrawn',
        'open'
    ) AS status,
    anyIf(JSONExtract(body, 'nodes', 'Array(String)'), type = 'GraphChangeProposed') AS nodes,
    anyIf(JSONExtractString(body, 'change'), type = 'GraphChangeProposed') AS change,
    anyIf(JSONExtractString(body, 'code'), type = 'GraphChangeRejected') AS code,
    anyIf(JSONExtractString(body, 'reason'), type = 'GraphChangeRejected') AS reason,
    anyIf(JSONExtractString(body, 'conflicts_with'), type = 'GraphChangeRejected') AS conflicts_with,
    anyIf(JSONExtractString(body, 'graph_hash'), type = 'GraphChangeAccepted') AS graph_hash,
    minIf(f.at, type = 'GraphChangeProposed') AS proposed_at,
    minIf(toNullable(f.at), type IN ('GraphChangeAccepted', 'GraphChangeRejected')) AS decided_at
FROM event_facts AS f FINAL
WHERE type IN ('GraphChangeProposed', 'GraphChangeAccepted', 'GraphChangeRejected', 'StepCancelled')
GROUP BY run_id, step_id
HAVING countIf(type = 'GraphChangeProposed') > 0;
