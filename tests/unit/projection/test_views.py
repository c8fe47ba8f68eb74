"""The views, on the real engine: the same facts give the same rows, however they come in."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.logs import LogWriter, Story, dead_letter_record, instance_record
from tidegate import codec
from tidegate.domain.states import ABSENT
from tidegate.projection import rows
from tidegate.projection.settings import ProjectionSettings
from tidegate.projection.store import Store
from tidegate.projection.tables import REBUILT_VIEWS as VIEWS

pytestmark = [pytest.mark.feature("O1"), pytest.mark.timeout(120)]
Facts = list[tuple[str, rows.Row]]  # table and row


def open_store(folder: Path, database: str) -> Store:
    return Store.open(ProjectionSettings(clickhouse_url=f"chdb://{folder}", clickhouse_database=database))


def facts_of(story: Story) -> Facts:
    """Return every fact of a story, in the order of the logs, with instances and dead letters that come and go."""
    found: dict[str, list[rows.Row]] = {table: [] for table in rows.COLUMNS}
    for offset, record in enumerate(LogWriter(3, 2).take(story.decided, trouble=0.0)):
        name, fields = codec.decode_facts(record.value)
        if name == "RunEntry":
            rows.add_run_events(found[rows.EVENTS], fields, record.partition, offset)
        elif name == "LedgerEntry":
            rows.add_ledger_events(found[rows.LEDGER], fields, record.partition, offset)
    for offset, name in enumerate(["ex-1", "ex-2", "ex-1", "ex-3"]):
        _, fields = codec.decode_facts(instance_record(name, at_ms=offset).value)
        found[rows.INSTANCES].append(rows.instance_row(fields, offset))
        _, fields = codec.decode_facts(dead_letter_record(offset, b"{\xff").value)
        found[rows.DEAD_LETTERS].append(rows.dead_letter_row(fields, offset))
    found[rows.INSTANCES].append(rows.removed_instance_row(b"ex-2", 4))
    removed = rows.removed_dead_letter_row(b"run-requests:0:1", 9)
    assert removed is not None
    found[rows.DEAD_LETTERS].append(removed)
    return [(table, row) for table, added in found.items() for row in added]


def insert(store: Store, facts: Facts) -> None:
    tables: dict[str, list[rows.Row]] = {}
    for table, row in facts:
        tables.setdefault(table, []).append(row)
    store.insert(tables)


def checksums(store: Store) -> dict[str, Any]:
    """Return the number of rows and a checksum of every view."""
    query = "SELECT count(), sum(cityHash64(toString(tuple(*)))) FROM {}"
    return {view: store.rows(query.format(view))[0] for view in VIEWS}


class Told:
    """A story, its facts, and what the views show when each fact is inserted once, in order, in one batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.story = Story()
        self.story.play_all()
        self.facts = facts_of(self.story)
        # Stays open: the engine ends with its last connection, and starting it takes a second.
        self.store = open_store(folder, "once")
        insert(self.store, self.facts)
        self.checksums = checksums(self.store)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    made = Told(tmp_path_factory.mktemp("views"))
    yield made
    made.store.close()


def test_facts_inserted_once_and_in_order_show_the_truth(told: Told) -> None:
    runs = {run_id: run for run_id, run in told.story.runs.runs.items() if run.status != ABSENT}

    shown = told.store.rows("SELECT run_id, status, last_seq FROM runs")
    assert {row[0]: row[1:] for row in shown} == {run_id: (run.status, run.seq) for run_id, run in runs.items()}
    steps = told.store.rows("SELECT run_id, step_id, status, attempts FROM steps")
    assert {row[:2]: row[2:] for row in steps} == {
        (run_id, step.step_id): (step.status, step.attempt)
        for run_id, run in runs.items()
        for step in run.steps.values()
    }
    assert all(count for view, (count, _) in told.checksums.items() if view not in ("unreadable", "account_budgets"))


@pytest.mark.feature("L4")
@pytest.mark.parametrize("seed", range(4))
def test_facts_doubled_split_anyhow_and_out_of_order_show_the_same(told: Told, seed: int) -> None:
    rng = random.Random(seed)
    facts = told.facts + rng.sample(told.facts, len(told.facts) // 2)
    if seed:  # 0: in order, then some of it again
        rng.shuffle(facts)
    store = open_store(told.folder, f"seed{seed}")
    try:
        while facts:
            count = rng.choice((1, 3, 20, 60))
            insert(store, facts[:count])
            facts = facts[count:]

        assert checksums(store) == told.checksums
        # What background merges leave in the end shows the same, too.
        for (table,) in store.rows(
            "SELECT name FROM system.tables WHERE database = currentDatabase() AND engine LIKE '%MergeTree'"
        ):
            store._command(f"OPTIMIZE TABLE {table} FINAL")
        assert checksums(store) == told.checksums
    finally:
        store.close()


def test_a_body_is_kept_letter_by_letter_whatever_is_in_it(told: Told) -> None:
    pieces = (
        '"',
        "\\",
        "\\u0041",
        "{",
        "}}",
        "[",
        "],",
        "\n",
        "\x00",
        "\x7f",
        "\u2028",
        "/",
        "é",
        "😀",
        "\\N",
        "null",
        '"}\n["',
    )
    rng = random.Random(1)
    texts = [*pieces, *("".join(rng.choices(pieces, k=rng.randint(2, 30))) for _ in range(300))]
    events = [
        ("CommandRefused", {"reason": text, text: [{}, {"a": [text]}, []], "n": -(2**63), "x": 1.5e300, "none": None})
        for text in texts
    ]
    entry = {"subject": "r", "account": "a", "epoch": 0, "now_ms": 5, "first_seq": 1, "cause": "", "events": events}
    found: list[rows.Row] = []
    rows.add_run_events(found, entry, 0, 0)
    store = open_store(told.folder, "letters")
    try:
        store.insert({rows.EVENTS: found})

        shown = store.rows("SELECT toString(seq), hex(body) FROM events ORDER BY seq")
        assert shown == [(str(row[1]), bytes(row[-1]).hex().upper()) for row in found]
    finally:
        store.close()


@pytest.mark.parametrize("view", VIEWS)
def test_a_column_read_alone_is_what_it_is_among_all(told: Told, view: str) -> None:
    """FINAL merges only what is read: a value in pieces (a tuple, say) could be put together of several rows' pieces."""
    store = open_store(told.folder, "apart")
    try:
        insert(store, told.facts[::2])
        insert(store, told.facts[1::2])
        store._command(f"CREATE OR REPLACE TABLE kept ENGINE = Memory AS SELECT * FROM {view}")
        for (column,) in store.rows(f"SELECT name FROM system.columns WHERE database = 'apart' AND table = '{view}'"):
            alone, among = (
                store.rows(f"SELECT sum(cityHash64(toString(`{column}`))) FROM {source}") for source in (view, "kept")
            )
            assert alone == among, column
    finally:
        store.close()
