"""The end of a simulated day: faults stop, everything runs until nothing moves, and it is looked at what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simulation.executor import ExecutorLife
from simulation.judge import Violation
from simulation.processes import GateLife, OwnerLife, ProjectionLife, RebuildLife, SchedulerLife
from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.machine import CorruptLogError, RefusedToStartError
from tidegate.projection import rows

if TYPE_CHECKING:
    from simulation.world import World

MAX_TAKE_OVER_TURNS = 100
QUIET_MS = 20_000
LONG_QUIET_MS = 60_000  # nothing that anybody waits for is due later
MAX_REST_ROUNDS = 20_000
MAX_READING_TURNS = 20_000
OWNERS: dict[str, type[OwnerLife]] = {"gate": GateLife, "scheduler": SchedulerLife}


class Evening:
    """Each method raises Violation if something is wrong. To be called in this order."""

    def __init__(self, world: World) -> None:
        self.world = world

    def rest(self) -> None:
        """Let the faults stop and everything run until nothing moves, then look at what came of it. Raises Violation."""
        self.world.is_calm = True
        self.world.broker.restore()
        self.world.broker.calm_down()
        at_posts = {id(post.life) for post in self.world.posts}
        for life in [life for life in self.world.lives if id(life) not in at_posts]:
            self.world.end(life, "an old one, ended at last")
        for life in self.world.lives:
            life.is_cut_off = False
            life.frozen_until_ms = 0
            life.wall_offset_ms = 0
        self.world.patience.resume_queues()
        self.world.treasury.lift_pauses()
        self._run_until_quiet()
        while self.world.work.answer_all() | self.world.patience.answer_all():
            self._run_until_quiet()
        self.world.judge.at_rest(self.world.work.unanswered | self.world.patience.unanswered)

    def _run_until_quiet(self) -> None:
        quiet_since_ms = self.world.now_ms
        for _ in range(MAX_REST_ROUNDS):
            before = self.world.work_writes
            self.world.broker.land_stragglers()
            for life in list(self.world.lives):
                for _ in range(2):
                    if not life.is_dead:
                        self.world.run(life)
            self.world.advance_by(20 if self.world.work_writes != before else 500)
            if self.world.work_writes != before or self._is_busy():
                quiet_since_ms = self.world.now_ms
            quiet_ms = self.world.now_ms - quiet_since_ms
            if quiet_ms > LONG_QUIET_MS or (quiet_ms > QUIET_MS and not self.world.judge.is_something_due()):
                return
        raise Violation("it never comes to rest")

    def _is_busy(self) -> bool:
        return any(post.life is None for post in self.world.posts) or any(
            isinstance(life, ExecutorLife) and life.attempts for life in self.world.lives
        )

    def check_rebuild(self) -> None:
        """A projection that reads everything from the beginning makes the tables that are there (8). Raises Violation."""
        rebuild = RebuildLife(self.world, "rebuild")
        self.world.lives.append(rebuild)
        self.world.run(rebuild, rebuild.start)
        for life in [life for life in self.world.lives if isinstance(life, ProjectionLife)]:
            turns = 0
            while life.is_behind():
                self.world.run(life)
                self.world.now_ms += 100
                turns += 1
                self.world.judge.require(
                    turns < MAX_READING_TURNS, f"(8) {life.name} never reaches the end of the logs"
                )
        for table, found in rebuild.store.tables.items():
            there = self.world.store.tables[table]
            # What was retired is in the older tables only.
            is_same = self._kept(found) == self._kept(there) if table == rows.LEDGER else found == there
            self.world.judge.require(is_same, f"(8) {table} rebuilt is not what it was")

    def _kept(self, table: dict[Any, rows.Row]) -> dict[Any, rows.Row]:
        logs = self.world.judge.logs
        return {key: row for key, row in table.items() if row[2] not in logs["gate-ledger", row[0]].retired}

    def check_refusals(self) -> None:
        """New owners read back what the old ones had; and they refuse a damaged log, and inputs that are lost (10)."""
        self._stop_owners()
        for service in OWNERS:
            life = self._new_owner(service, f"{service}-restored")
            for part in life.loop.owned.values():
                self.world.judge.owned(part)
        self._stop_owners()
        first, second = self.world.rng.sample(sorted(OWNERS), 2)
        if self._damage(first):
            self._expect_refusal(first, CorruptLogError)
        if self._lose_input(second):
            self._expect_refusal(second, RefusedToStartError)

    def _stop_owners(self) -> None:
        for life in [life for life in self.world.lives if isinstance(life, OwnerLife)]:
            self.world.end(life, "stopped for good")
            for group, instance_id in life.memberships:
                self.world.contacts.pop((group, instance_id), None)
                self.world.broker.expire(group, instance_id)
        self.world.posts = [post for post in self.world.posts if post.service not in OWNERS]

    def _new_owner(self, service: str, name: str) -> OwnerLife:
        life = OWNERS[service](self.world, name)
        assert isinstance(life, OwnerLife)
        self.world.lives.append(life)
        self.world.stack_of_turns.append(life)
        try:
            life.start()
            for _ in range(MAX_TAKE_OVER_TURNS):
                life.turn()
                if len(life.loop.owned) == self.world.topics[life.loop.machine.log_topic]:
                    return life
        finally:
            self.world.stack_of_turns.pop()
        raise Violation(f"{life} never has all its partitions")

    def _expect_refusal(self, service: str, refusal: type[EventLogError]) -> None:
        try:
            self._new_owner(service, f"{service}-deceived")
        except refusal:
            return
        except Exception as error:
            raise Violation(f"a {service} falls over with {error!r}, a {refusal.__name__} was due") from error
        raise Violation(f"a {service} works on as if nothing were wrong, a {refusal.__name__} was due")

    def _damage(self, service: str) -> bool:
        """Let an entry vanish that another one of its subject follows; returns whether there is one."""
        log = "run-events" if service == "scheduler" else "gate-ledger"
        found = [
            (partition, offset)
            for partition in range(self.world.topics[log])
            for offsets in self.world.judge.logs[log, partition].entries.values()
            for offset in offsets[:-1]
            if self.world.judge.logs[log, partition].is_read_back(offset)
        ]
        if found:
            self.world.broker.lose(log, *self.world.rng.choice(found))
            self.world.faults["snapshots damaged"] += 1
            snapshots = "run-snapshots" if service == "scheduler" else "gate-snapshots"
            for partition in range(self.world.topics[snapshots]):  # with them nobody would look so far back
                self.world.broker.delete_before(
                    snapshots, partition, self.world.broker.offsets(snapshots, partition).end
                )
        return bool(found)

    def _lose_input(self, service: str) -> bool:
        """Let retention take messages that were not read; returns whether the log says how far it had read at all."""
        log, topic = ("run-events", "run-commands") if service == "scheduler" else ("gate-ledger", "gate-requests")
        found = [p for p in range(self.world.topics[topic]) if topic in self.world.judge.logs[log, p].inputs]
        for partition in found[:1]:
            for _ in range(3):
                self.world.judge.rubbish.add(
                    self.world.write(topic, partition, f"lost-{self.world.work.number()}", b"lost")
                )
            self.world.broker.delete_before(topic, partition, self.world.broker.offsets(topic, partition).end)
        return bool(found)
