-- What a call of an outside tool waits with are its arguments: where its decision says `redact`, `events` hides them there, too

CREATE OR REPLACE VIEW events AS
SELECT
    run_id, seq, at, type, step_id, attempt, actual_micros, account, cause, `partition`, `offset`, epoch,
    multiIf(
        NOT JSONHas(f.body, 'call', 'arguments') AND type != 'WaitStarted'
            OR (run_id, step_id) NOT IN (SELECT run_id, step_id FROM redaction_state), f.body,
        replaceOne(
            f.body,
            concat(
                if(type = 'WaitStarted', '"input":', '"arguments":') AS place,
                if(type = 'WaitStarted', JSONExtractRaw(f.body, 'input'), JSONExtractRaw(f.body, 'call', 'arguments'))
            ),
            concat(place, '"(redacted)"')
        ) AS cut != f.body, cut,
        '"(redacted)"'
    ) AS body
FROM event_facts AS f FINAL;
