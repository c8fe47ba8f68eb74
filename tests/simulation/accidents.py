"""What can go wrong between turns. Each method makes one thing go wrong, if it can just now; the profile says how often."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulation import work as works
from simulation.executor import ExecutorLife
from simulation.processes import GateLife, Life
from tidegate import codec
from tidegate.domain.messages import Instance
from tidegate.gate.service import GateMachine
from tidegate.scheduler import admission

if TYPE_CHECKING:
    from simulation.world import World

SNAPSHOTS = frozenset({"run-snapshots", "gate-snapshots"})


class Accidents:
    """What befalls a world, but for the edges at which processes are killed or stopped in the middle of what they do."""

    def __init__(self, world: World) -> None:
        self.world = world

    def _some_life(self) -> Life | None:
        return self.world.rng.choice(self.world.lives) if self.world.lives else None

    def kill(self) -> None:
        if (life := self._some_life()) is not None:
            self.world.faults["killed"] += 1
            self.world.end(life, "killed")

    def freeze(self) -> None:
        if (life := self._some_life()) is not None:
            self.world.faults["frozen"] += 1
            life.frozen_until_ms = self.world.now_ms + self.world.rng.choice(
                (100, 1_000, 4_000, self.world.lease_ms + 500)
            )

    def suspend(self) -> None:
        """The machine of a process sleeps: its monotonic clock stands still meanwhile."""
        if (life := self._some_life()) is not None:
            self.world.faults["suspended"] += 1
            length_ms = self.world.rng.choice((1_000, 4_000, self.world.lease_ms + 500))
            life.suspended_ms += length_ms
            life.frozen_until_ms = self.world.now_ms + length_ms

    def drain(self) -> None:
        life = self._some_life()
        if life is not None and not life.is_inside:
            self.world.faults["drained"] += 1
            self.world.run(life, life.drain)

    def twin(self) -> None:
        """Somebody starts a post's process a second time while the first one still runs."""
        post = self.world.rng.choice(self.world.posts)
        if post.life is not None and self.world.broker.reachable:
            self.world.faults["twins"] += 1
            self.world.start(post)

    def hide_beats(self) -> None:
        """Two executors beat under one instance id, the older one last, and compaction leaves only its beat of all the time in
        which the gates got nowhere, although they kept their places: the younger one seems to have been silent."""
        posts = [post for post in self.world.posts if isinstance(post.life, ExecutorLife)]
        if not posts or not self.world.broker.reachable:
            return
        self.world.faults["beats hidden"] += 1
        post = self.world.rng.choice(posts)
        older = post.life
        self.world.start(post)
        self._beat_for(self.world.rng.choice((500, 1_000, 3_000)), [older, post.life])
        stopped_ms = self.world.lease_ms + 500
        for gate in self._gates():
            gate.frozen_until_ms = self.world.now_ms + stopped_ms
        self._beat_for(stopped_ms, [post.life, older])
        if self.world.broker.reachable:
            self.world.broker.compact("instances")

    def _beat_for(self, ms: int, executors: list[Life | None]) -> None:
        """Let everybody work for so long while these executors beat, in this order."""
        until_ms = self.world.now_ms + ms
        while self.world.now_ms < until_ms:
            for _ in range(self.world.rng.randint(1, 40)):
                self.world.turn()
            for gate in self._gates():
                for membership in gate.memberships:
                    self.world.seen_in_group(*membership)
            self.world.advance_by(250)
            for life in executors:
                for _ in range(2):  # to hear of the last one, and to send the next
                    if isinstance(life, ExecutorLife) and self._may_run(life):
                        self.world.run(life, life.beat_now)

    def _gates(self) -> list[GateLife]:
        return [life for life in self.world.lives if isinstance(life, GateLife)]

    def unregister(self) -> None:
        """Somebody removes the line of an executor, or a process of another service comes with its name."""
        other = Instance(
            instance_id="executor-0",
            service="gateway",
            incarnation=-1,
            state="ready",
            host="h",
            boot_id="b",
            pid=1,
            pid_started=0.0,
            started_ms=0,
            at_ms=self.world.now_ms,
        )
        names = [post.name for post in self.world.posts if post.service == "executor"]
        if self.world.broker.reachable:
            self.world.faults["unregistered"] += 1
            value = self.world.rng.choice((None, codec.encode(other)))
            self.world.write("instances", 0, self.world.rng.choice(names), value)

    def _may_run(self, life: Life) -> bool:
        return not life.is_dead and not life.is_inside and life.frozen_until_ms <= self.world.now_ms

    def cut_off(self) -> None:
        if (life := self._some_life()) is not None:
            self.world.faults["cut off"] += 1
            life.is_cut_off = True

    def broker_away(self) -> None:
        self.world.faults["broker away"] += 1
        self.world.broker.interrupt()
        self.world.broker_back_ms = self.world.now_ms + self.world.rng.choice((10, 100, 1_000, 8_000))

    def expire(self) -> None:
        if self.world.contacts:
            self.world.faults["sessions ended"] += 1
            group, instance_id = self.world.rng.choice(sorted(self.world.contacts))
            self.world.broker.expire(group, instance_id)

    def land(self) -> None:
        self.world.broker.land_stragglers()

    def jump_clock(self) -> None:
        if (life := self._some_life()) is not None:
            self.world.faults["clock jumps"] += 1
            life.wall_offset_ms = self.world.rng.choice((0, -3_600_000, -5_000, 400, 5_000, 3_600_000))

    def compact(self) -> None:
        """Logs and tables may be compacted at any time, mailboxes as far as they were read (`min.compaction.lag.ms`)."""
        if not self.world.broker.reachable:
            return
        self.world.faults["compactions"] += 1
        name = self.world.rng.choice(sorted(self.world.topics))
        self.world.broker.compact(name, self._read_up_to(name))
        if name in SNAPSHOTS and self.world.rng.random() < 0.5:
            self.world.broker.purge(name)

    def retain(self) -> None:
        """Retention takes from mailboxes, but only what was read: it is longer than any outage."""
        if not self.world.broker.reachable:
            return
        name = self.world.rng.choice([topic for topic in self.world.topics if self._read_up_to(topic) is not None])
        for partition, offset in (self._read_up_to(name) or {}).items():
            self.world.faults["retention"] += 1
            start = self.world.broker.offsets(name, partition).start
            self.world.broker.delete_before(name, partition, self.world.rng.randint(start, max(start, offset)))

    def _read_up_to(self, topic: str) -> dict[int, int] | None:
        """Return how far a mailbox was certainly read; None for what is no mailbox."""
        if topic in works.MAILBOXES:
            log = "gate-ledger" if topic in GateMachine.marked_topics else "run-events"
            return {p: self.world.judge.recorded(log, p, topic) for p in range(self.world.topics[topic])}
        if topic == "run-requests":
            committed = self.world.broker.committed(f"{admission.GROUP}:run-requests")
            return {partition: committed.get(partition, 0) for partition in range(self.world.topics[topic])}
        if topic.startswith("step-tasks."):
            return {partition: self._tasks_read(topic, partition) for partition in range(self.world.topics[topic])}
        return None

    def _tasks_read(self, topic: str, partition: int) -> int:
        positions = [
            offset
            for life in self.world.lives
            if isinstance(life, ExecutorLife)
            for at, offset in life.positions().items()
            if (at.topic, at.partition) == (topic, partition)
        ]
        return min(positions, default=0)

    def repeat_mail(self) -> None:
        """A message that was delivered comes again, as after a producer's retry or a mirror's restart."""
        if not self.world.broker.reachable or not self.world.judge.mail:
            return
        self.world.faults["messages repeated"] += 1
        names = [topic for topic in self.world.topics if topic in works.MAILBOXES or topic.startswith("step-tasks")]
        name = self.world.rng.choice(names)
        partition = self.world.rng.randrange(self.world.topics[name])
        start, end = self.world.broker.offsets(name, partition)
        read = (self._read_up_to(name) or {}).get(partition, 0)
        at = self.world.rng.randint(start, max(start, min(end, read)))
        for message in self.world.broker.read(name, partition, at, end):
            place = (name, partition, message.offset)
            if place in self.world.judge.rubbish or message.offset >= read:
                return
            offset = self.world.write(name, partition, (message.key or b"").decode(), message.value)[2]
            self.world.note(f"{name}-{partition}@{message.offset} came again as {offset}")
            return

    def damage_snapshots(self) -> None:
        """Snapshots are disposable: whatever becomes of them, the log is still there."""
        name = self.world.rng.choice(sorted(SNAPSHOTS))
        partition = self.world.rng.randrange(self.world.topics[name])
        if not self.world.broker.reachable:
            return
        start, end = self.world.broker.offsets(name, partition)
        found = list(self.world.broker.read(name, partition, start, end))
        if not found:
            return
        self.world.faults["snapshots damaged"] += 1
        key = self.world.rng.choice(found).key or b""
        if (
            self.world.rng.random() < 0.5
        ):  # with all that was ever written under its key: else something older would be there again
            for message in found:
                if message.key == key:
                    self.world.broker.lose(name, partition, message.offset)
        else:
            self.world.write(name, partition, key.decode(), self.world.rng.choice((None, b"", b"{}", b"\xc3\x01")))
