"""The projection's loop, with a group that takes and gives partitions at will and an inserter that is slow or fails."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping

import pytest
from fastavro.schema import fingerprint, to_parsing_canonical_form

from support.logs import Decided, LogWriter, Story, dead_letter_record, instance_record
from tidegate import codec
from tidegate.eventlog.interface import Message, Record, TopicPartition
from tidegate.eventlog.kafka.subscription import AssignmentChange
from tidegate.eventlog.memory import MemoryBroker
from tidegate.projection import rows, service
from tidegate.projection.inserter import Batch
from tidegate.projection.service import TOPICS, CompanyError, Limits, Projection

COUNTS = {"run-events": 3, "gate-ledger": 2}
Key = tuple[object, ...]
USUAL = Limits(0.2, 1000, 10**6)


class Group:
    """Reads a memory broker as a member of a group would, and can be made to lose everything and get it back."""

    def __init__(self, broker: MemoryBroker, rng: random.Random) -> None:
        self._broker = broker
        self._rng = rng
        self.all = frozenset(TopicPartition(topic, n) for topic in TOPICS for n in range(COUNTS.get(topic, 1)))
        self.assigned: frozenset[TopicPartition] = frozenset()
        self.has_share = False
        self.group_offsets: dict[TopicPartition, int] = {}
        self._reading: dict[TopicPartition, int] = {}
        self._change = AssignmentChange({}, frozenset())
        self._outdated: list[Message] = []
        # A client that breaks its promise: messages from before a change come after it, once.
        self.outdated_messages = False
        self.paused = False

    def rebalance(self, offsets: Mapping[TopicPartition, int] | None = None) -> None:
        """Take everything and give it back, to be read from what is committed, or from where another member got to."""
        if self.outdated_messages:
            self._outdated = [m for at in sorted(self.assigned) for m in self._next(at, self._rng.randint(0, 4))]
        self.group_offsets.update(offsets or {})
        gained = {at: self.group_offsets.get(at) for at in self.all}
        self._change = AssignmentChange(gained, self.assigned | self._change.lost)
        self.assigned = self.all
        self.has_share = True
        self._reading = dict(self.group_offsets)
        self.paused = False

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        if not self.assigned:
            self.rebalance()
        messages, self._outdated = self._outdated, []
        if self.paused:
            return messages
        for at in self._rng.sample(sorted(self.assigned), len(self.assigned)):
            messages += self._next(at, self._rng.randint(0, 6))
        return messages

    def _next(self, at: TopicPartition, count: int) -> list[Message]:
        position = self._reading.get(at, 0)
        end = self._broker.offsets(at.topic, at.partition).end
        found = list(self._broker.read(at.topic, at.partition, position, min(end, position + count)))
        self._reading[at] = min(end, position + count)
        return found

    def take_changes(self) -> AssignmentChange:
        change, self._change = self._change, AssignmentChange({}, frozenset())
        return change

    def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        self.group_offsets.update(positions)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def ends(self) -> dict[TopicPartition, int]:
        return {at: self._broker.offsets(at.topic, at.partition).end for at in self.assigned}

    def close(self) -> None:
        self.assigned = frozenset()

    @property
    def is_at_end(self) -> bool:
        return all(self.group_offsets.get(at, 0) >= end for at, end in self.ends().items())


class Tables:
    """An inserter without a thread. What it keeps is what ClickHouse would show: the last row of each identity."""

    def __init__(self, rng: random.Random, slowness: int = 0) -> None:
        self._rng = rng
        self._slowness = slowness
        self._batch: Batch | None = None
        self._done: Batch | None = None
        self._left = 0
        # How many turns an insert takes; None: as the seed says, up to `slowness`.
        self.lasting: int | None = None
        self.failing = ""
        self.batches: list[Batch] = []
        self.kept: dict[str, dict[Key, rows.Row]] = {table: {} for table in rows.COLUMNS}

    def start(self) -> None: ...

    @property
    def is_idle(self) -> bool:
        return self._batch is None and self._done is None

    def submit(self, batch: Batch) -> None:
        assert self.is_idle
        self._batch = batch
        self._left = self._rng.randint(0, self._slowness) if self.lasting is None else self.lasting

    def _work(self) -> None:
        if self._batch is None:
            return
        if self._left:
            self._left -= 1
            return
        batch, self._batch = self._batch, None
        self.batches.append(batch)
        for table, found in batch.tables.items():
            for row in found:
                self.kept[table][_identity(table, row)] = row
        self._done = batch

    def take_done(self) -> Batch | None:
        self._work()
        done, self._done = self._done, None
        return done

    def wait(self, timeout_s: float) -> bool:
        self._work()
        return self._batch is None

    def stop(self, timeout_s: float) -> bool:
        while self._batch is not None:
            self._work()
        return True


def _identity(table: str, row: rows.Row) -> Key:
    names = {
        rows.EVENTS: ("run_id", "seq"),
        rows.LEDGER: ("ledger", "seq"),
        rows.INSTANCES: ("instance_id",),
    }.get(table, ("topic", "partition", "offset") if table != rows.FRESHNESS else ("topic", "partition"))
    return tuple(row[rows.COLUMNS[table].index(name)] for name in names)


class World:
    """A broker with the topics, a group, tables and the projection between them, on a clock of its own."""

    def __init__(self, seed: int = 0, *, slowness: int = 0, limits: Limits = USUAL) -> None:
        self.rng = random.Random(seed)
        self.broker = MemoryBroker()
        for topic in (*TOPICS, "schemas"):
            self.broker.create_topic(topic, COUNTS.get(topic, 1))
        self.group = Group(self.broker, self.rng)
        self.tables = Tables(self.rng, slowness)
        self.limits = limits
        self.now_s = 100.0
        self.naps: list[float] = []
        self.projection = self.new_projection()

    def new_projection(self, *, alone: bool = False) -> Projection:
        return Projection(
            self.group,
            self.broker,
            self.tables,  # type: ignore[arg-type] # stands in for the thread
            self.limits,
            alone=alone,
            clock_ms=lambda: int(self.now_s * 1000),
            monotonic_s=lambda: self.now_s,
            sleep=self.naps.append,
        )

    def write(self, records: list[Record]) -> None:
        writer = self.broker.writer()
        for record in records:
            writer.send(record)
        writer.flush(1.0)

    def turn(self, seconds: float = 0.05) -> None:
        self.now_s += seconds
        self.projection.run_once()

    def finish(self) -> None:
        for _ in range(3000):
            self.turn()
            if self.group.is_at_end:
                return
        raise AssertionError("it never gets to the end")

    def crash(self) -> None:
        """The process dies; what was not committed is read again by the next one."""
        self.tables._batch = self.tables._done = None
        self.group.assigned = frozenset()
        self.projection = self.new_projection()


def expected_keys(valid: list[Decided]) -> tuple[set[Key], int]:
    """Return the identities of all valid run events, and how many ledger events there are."""
    seqs: dict[str, int] = {}
    keys: set[Key] = set()
    ledger = 0
    for decided in valid:
        if decided.log != "run-events":
            ledger += len(decided.events)
            continue
        for _ in decided.events:
            seqs[decided.subject] = seqs.get(decided.subject, 0) + 1
            keys.add((decided.subject, seqs[decided.subject]))
    return keys, ledger


def check(world: World, log: LogWriter) -> None:
    keys, ledger = expected_keys(log.valid)
    assert set(world.tables.kept[rows.EVENTS]) == keys
    assert len(world.tables.kept[rows.LEDGER]) == ledger
    assert not any("zombie" in map(str, row) for table in world.tables.kept.values() for row in table.values())
    assert not world.tables.kept[rows.UNREADABLE]


def story() -> Story:
    told = Story()
    told.play_all()
    return told


@pytest.mark.feature("O1")
def test_every_valid_event_becomes_a_row_and_no_void_one() -> None:
    world, log = World(), LogWriter(3, 2)
    world.write(log.take(story().decided, trouble=0.4))

    world.finish()

    assert log.void_count > 0
    assert world.projection.counters.void >= log.void_count
    check(world, log)


@pytest.mark.feature("L4")
@pytest.mark.parametrize("outdated", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_rebalances_crashes_and_resets_at_any_moment_change_nothing(seed: int, outdated: bool) -> None:
    world, log, told = World(seed, slowness=5), LogWriter(3, 2, seed), story()
    world.group.outdated_messages = outdated
    rng = world.rng
    decided = told.decided
    while decided:
        cut = rng.randint(1, 12)
        world.write(log.take(decided[:cut], trouble=0.3))
        decided = decided[cut:]
        for _ in range(rng.randint(0, 6)):
            world.turn()
            match rng.randint(0, 9):
                case 0:
                    world.group.rebalance()
                case 1:
                    # An operator, or the member that had them meanwhile, moved the offsets, back or forth. What lies
                    # before a later offset was inserted by that member; here the truth must not depend on it: back only.
                    back = {at: rng.randint(0, offset) for at, offset in world.group.group_offsets.items()}
                    world.group.rebalance(back)
                case 2:
                    world.crash()

    world.finish()

    check(world, log)


def test_a_rebalance_that_skips_what_another_member_did_looks_for_the_epoch_again() -> None:
    world, log, told = World(), LogWriter(3, 2), story()
    half = len(told.decided) // 2
    world.write(log.take(told.decided[:half], trouble=0.0))
    world.finish()
    before = set(world.tables.kept[rows.EVENTS])
    # New owners everywhere, then entries: another member projects all that, and gives the partitions back at its end.
    for partition in (part for parts in log._logs.values() for part in parts if part.epoch >= 0):
        partition.announce()
    skipped = log.take(told.decided[half:-6], trouble=0.0)
    world.write(skipped)
    world.group.rebalance({at: world.broker.offsets(*at).end for at in world.group.all})

    world.write(log.take(told.decided[-6:], trouble=0.0))
    world.finish()

    added = set(world.tables.kept[rows.EVENTS]) - before
    expected = expected_keys(log.valid)[0] - expected_keys(told.decided[:-6])[0]
    assert added == expected
    assert world.projection.counters.void == 0


def test_messages_from_before_a_change_do_not_spoil_the_epoch_of_those_after_it() -> None:
    world, log, told = World(3), LogWriter(3, 2), story()
    world.group.outdated_messages = True
    world.write(log.take(told.decided[:40], trouble=0.0))
    world.finish()
    for partition in (part for parts in log._logs.values() for part in parts if part.epoch >= 0):
        partition.announce()
    world.write(log.take(told.decided[40:], trouble=0.0))

    for _ in range(20):
        world.group.rebalance(dict.fromkeys(world.group.all, 0))
        world.turn()
    world.finish()

    assert world.projection.counters.void == 0
    check(world, log)


def test_what_another_member_committed_meanwhile_is_not_taken_back() -> None:
    for turns in range(1, 12):
        world, log = World(turns, slowness=8), LogWriter(3, 2)
        world.write(log.take(story().decided))
        for _ in range(turns):
            world.turn()
        ends = world.group.ends()
        world.group.rebalance(ends)

        for _ in range(60):
            world.turn()

        assert world.group.group_offsets == ends


def test_an_entry_gives_all_its_rows_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks_on_the_second(found: list[rows.Row], entry: dict[str, object], partition: int, offset: int) -> None:
        add(found, entry | {"events": entry["events"][:1]}, partition, offset)
        if len(entry["events"]) > 1:
            raise ValueError("a field that cannot be written")

    add = rows.add_run_events
    monkeypatch.setattr(rows, "add_run_events", breaks_on_the_second)
    world, log = World(), LogWriter(3, 2)
    world.write(log.take(story().decided, trouble=0.0))

    world.finish()

    singles = [d for d in log.valid if d.log == "run-events" and len(d.events) == 1]
    several = [d for d in log.valid if d.log == "run-events" and len(d.events) > 1]
    assert len(world.tables.kept[rows.EVENTS]) == len(singles)
    assert len(world.tables.kept[rows.UNREADABLE]) == len(several) > 0


def test_a_full_batch_waits_for_the_one_before_it_and_reading_pauses() -> None:
    world, log = World(slowness=40, limits=Limits(0.2, 20, 10**6)), LogWriter(3, 2)
    world.write(log.take(story().decided))
    paused, most = 0, 0

    for _ in range(1000):
        world.turn()
        paused += world.group.paused
        most = max(most, world.projection._batch.row_count)
        if world.group.is_at_end:
            break

    assert paused
    # One poll may bring more than the bound, never much more.
    assert most < 20 + 5 * 8 * 6
    check(world, log)


def test_bytes_fill_a_batch_too() -> None:
    world, log = World(limits=Limits(0.2, 10**6, 3000)), LogWriter(3, 2)
    world.write(log.take(story().decided))

    world.finish()

    assert len(world.tables.batches) > 5
    check(world, log)


def test_who_lost_its_share_of_the_group_is_not_ready_until_it_has_one_again() -> None:
    world = World()
    assert world.projection.why_not_ready() == "the group of the projection has given us no share of its partitions"
    world.turn()
    assert world.projection.why_not_ready() == ""
    world.group.has_share = False
    world.turn()
    assert world.projection.why_not_ready()


@pytest.mark.parametrize("taken", [{"run-events"}, set(TOPICS)], ids=["some", "all"])
def test_tables_that_nobody_else_can_fill_are_not_filled_by_one_of_several(
    taken: set[str],
) -> None:
    world, log = World(), LogWriter(3, 2)
    world.write(log.take(story().decided))
    everything = world.group.all
    others = {at for at in everything if at.topic in taken and (at.partition or taken == set(TOPICS))}
    world.group.all -= others
    newcomer = world.new_projection(alone=True)
    with pytest.raises(CompanyError, match="a group of its own"):
        newcomer.run_once()
    assert (newcomer.counters.messages, world.tables.batches) == (0, [])

    # Who was there first goes on, with what it has, and gets the rest when the newcomer is gone.
    world.group.all = everything
    world.group.rebalance()
    world.projection = world.new_projection(alone=True)
    for group in (everything, everything - others, everything):
        world.group.all = group
        world.group.rebalance()
        world.turn()
    world.finish()
    assert world.tables.kept[rows.EVENTS].keys() == expected_keys(log.valid)[0]


def test_a_topic_that_the_group_has_not_heard_of_yet_is_no_company() -> None:
    world = World()
    world.group.all = frozenset(at for at in world.group.all if at.topic != "dead-letters")
    newcomer = world.new_projection(alone=True)
    newcomer.run_once()
    assert newcomer.why_not_ready() == ""


def test_heartbeats_alone_wait_longer_than_events_do() -> None:
    world = World()
    world.turn()
    world.write([instance_record("ex-1", incarnation=3)])
    began_s, before = world.now_s, len(world.tables.batches)
    while len(world.tables.batches) == before:
        world.turn(0.05)
    assert world.now_s - began_s >= service.HEARTBEATS_WAIT_S

    log = LogWriter(3, 2)
    world.write(log.take(story().decided[:3]))
    began_s, before = world.now_s, len(world.tables.batches)
    while len(world.tables.batches) == before:
        world.turn(0.05)
    assert world.now_s - began_s < service.HEARTBEATS_WAIT_S


def test_a_slow_stream_is_inserted_by_time_and_the_less_often_the_longer_an_insert_takes() -> None:
    def batches_in(seconds: float, insert_turns: int) -> list[Batch]:
        world, log, told = World(), LogWriter(3, 2), story()
        world.tables.lasting = insert_turns
        for decided in told.decided[: int(seconds / 0.05)]:
            world.write(log.take([decided], trouble=0.0))
            world.turn(0.05)
        return world.tables.batches

    quick, slow = batches_in(4.0, 0), batches_in(4.0, 3)

    # A batch takes 0.2 s to fill. An insert of 0.15 s is followed by a rest of five times that.
    assert 10 <= len(quick) <= 20
    assert 3 <= len(slow) <= 5
    assert sum(batch.row_count for batch in slow) > 50


def test_after_a_batch_of_many_rows_clickhouse_may_rest_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    def longest_rest_s() -> float:
        world, log, told = World(), LogWriter(3, 2), story()
        world.tables.lasting = 10  # an insert of half a second and more, five times which is beyond any rest
        seen_s = []
        for decided in told.decided[:200]:
            world.write(log.take([decided], trouble=0.0))
            before = len(world.tables.batches)
            world.turn(0.05)
            if len(world.tables.batches) > before:
                seen_s.append(world.now_s)
        return max(later - earlier for earlier, later in itertools.pairwise(seen_s))

    few_s = longest_rest_s()
    monkeypatch.setattr(service, "MANY_ROWS", 1)
    many_s = longest_rest_s()

    assert service.LONGEST_REST_S < few_s < many_s
    assert many_s - few_s == pytest.approx(service.LONGEST_REST_UNDER_LOAD_S - service.LONGEST_REST_S, abs=0.2)


def test_a_full_batch_waits_for_no_rest() -> None:
    world, log = World(limits=Limits(60.0, 10, 10**6)), LogWriter(3, 2)
    world.tables.lasting = 2
    world.write(log.take(story().decided))
    began_s = world.now_s

    while sum(batch.row_count for batch in world.tables.batches) < 100:
        world.turn(0.01)

    assert world.now_s - began_s < service.LONGEST_REST_S


def test_polls_that_bring_little_are_followed_by_a_nap_that_ends_when_the_batch_is_due() -> None:
    world, log = World(), LogWriter(3, 2)
    world.turn()
    assert world.naps == []  # waiting for a first message is the poll's affair

    world.write(log.take(story().decided[:60]))
    world.finish()

    assert world.naps
    assert all(0 <= nap <= service.NAP_S for nap in world.naps)


def test_freshness_tells_how_far_each_partition_is_and_is_renewed_while_nothing_happens() -> None:
    world, log = World(), LogWriter(3, 2)
    world.write(log.take(story().decided))
    world.finish()

    def freshness() -> dict[Key, rows.Row]:
        return dict(world.tables.kept[rows.FRESHNESS])

    first = freshness()
    for at, end in world.group.ends().items():
        if end:
            assert first[at][2:4] == (end, end)
    for _ in range(30):
        world.turn(1.0)

    later = freshness()
    assert {at: row[:5] for at, row in later.items()} == {at: row[:5] for at, row in first.items()}
    assert all(later[at][5] > first[at][5] for at in first)


def test_what_is_missing_of_a_partition_is_said_by_who_has_it_and_by_nobody_who_had_it() -> None:
    """Alerts add up what the members say: one that goes on saying what it knew of a lost partition is never silent again."""
    world, log = World(), LogWriter(3, 2)
    world.write(log.take(story().decided))
    world.tables.lasting = 3
    while world.tables._batch is None:
        world.turn()
    batch = world.tables._batch
    assert batch is not None
    lost = min(batch.positions)
    kept = max(batch.positions)
    assert lost != kept
    batch.whole_to = dict.fromkeys(batch.positions, 0)  # an empty database, say
    world.group.assigned -= {lost}
    world.group._change = AssignmentChange({}, frozenset({lost}))
    while world.tables._batch is batch or world.tables._done is batch:
        world.turn()

    assert world.projection._missing.get(kept, 0) > 0
    assert lost not in world.projection._missing


@pytest.mark.feature("L4")
def test_a_commit_that_the_broker_did_not_hear_is_made_good_while_nothing_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the group would seem behind for as long as nothing new comes, to whoever scales by its lag for instance."""
    world, log = World(), LogWriter(3, 2)
    world.write(log.take(story().decided))
    with monkeypatch.context() as patch:
        patch.setattr(world.group, "commit", lambda _: None)
        for _ in range(300):
            world.turn()
    assert not world.group.is_at_end
    for _ in range(3):
        world.turn(service.FRESHNESS_EVERY_S)
    assert world.group.is_at_end
    check(world, log)


@pytest.mark.feature("O1")
def test_records_that_cannot_be_read_are_noted_and_the_rest_goes_on() -> None:
    world, log = World(), LogWriter(3, 2)
    log_records = log.take(story().decided)
    foreign = instance_record("x").value
    half_an_entry = next(r for r in log_records if r.topic == "run-events" and not r.key.startswith(b"owner"))
    rubbish = [
        Record("run-events", 0, b"a", b"rubbish"),
        Record("run-events", 0, b"b", foreign),
        Record("run-events", 0, b"c", b"\xc3\x01" + b"\x00" * 8),
        Record("run-events", 0, b"d", half_an_entry.value[:-3]),
        Record("instances", 0, b"e", b""),
        Record("dead-letters", 0, b"f", b"\xc3"),
    ]
    world.write([*rubbish, instance_record("ex-1"), dead_letter_record(3, b"{")])
    # The offsets of the log moved by the rubbish in partition 0: only the other partitions' records are still right.
    world.write([record for record in log_records if record.topic == "run-events" and record.partition != 0])

    world.finish()

    noted = world.tables.kept[rows.UNREADABLE]
    assert len(noted) == world.projection.counters.unreadable == len(rubbish)
    assert all(row[3] for row in noted.values())
    assert len(world.tables.kept[rows.EVENTS]) > 0
    assert set(world.tables.kept[rows.INSTANCES]) == {("ex-1",)}
    assert len(world.tables.kept[rows.DEAD_LETTERS]) == 1


def test_a_schema_of_a_newer_writer_is_learned_from_the_schemas_topic() -> None:
    world = World()
    value = dead_letter_record(9, b"{").value
    schema = json.loads(codec.schema_texts()[value[2:10].hex()])
    schema["fields"].append({"name": "severity", "type": "string"})
    newer = fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO")
    record = b"\xc3\x01" + bytes.fromhex(newer) + value[10:] + b"\x08high"
    world.write([Record("dead-letters", 0, b"before", record)])
    world.finish()
    assert len(world.tables.kept[rows.UNREADABLE]) == 1

    world.write([Record("schemas", 0, newer.encode(), json.dumps(schema).encode())])
    world.crash()
    world.group.rebalance({TopicPartition("dead-letters", 0): 0})
    world.finish()

    assert [key[2] for key in world.tables.kept[rows.DEAD_LETTERS]] == [9]


def test_closing_inserts_and_commits_what_was_read() -> None:
    world, log = World(slowness=3), LogWriter(3, 2)
    world.write(log.take(story().decided))
    for _ in range(8):
        world.turn(0.0)

    world.projection.close()

    read = len(world.tables.kept[rows.EVENTS])
    assert read > 0
    world.crash()
    world.finish()
    check(world, log)
