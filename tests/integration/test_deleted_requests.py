"""Requests that the broker deletes before admission has read them: somebody is told."""

from __future__ import annotations

import pytest
from confluent_kafka import TopicPartition as KafkaPartition
from confluent_kafka.admin import NewTopic  # type: ignore[attr-defined]  # exported, but not marked so

from support.stack import eventually
from tidegate import codec, metrics
from tidegate.domain.messages import DeadLetter
from tidegate.eventlog.interface import Record
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.letter_box import CannotRedriveError, Stored, redrive_record
from tidegate.eventlog.settings import KafkaSettings
from tidegate.scheduler.admission import Admission
from tidegate.scheduler.settings import SchedulerSettings

TOPICS = ("run-requests", "run-commands", "dead-letters", "workflows")
REQUEST = b'{"type": "cancel", "run_id": "r"}'


class Inbox:
    """The topics that admission needs, one partition each, and an admission that comes and goes."""

    def __init__(self, bootstrap: str, prefix: str) -> None:
        self.settings = KafkaSettings(bootstrap=bootstrap, topic_prefix=prefix)
        self.broker = KafkaBroker(self.settings)
        admin = self.broker.admin_client()
        for future in admin.create_topics([NewTopic(prefix + topic, 1, 1) for topic in TOPICS]).values():
            future.result()
        eventually(lambda: len(self.broker.describe(TOPICS)) == len(TOPICS), "the topics")
        self.writer = self.broker.writer()

    def ask(self, count: int) -> None:
        for number in range(count):
            self.writer.send(Record("run-requests", 0, b"%d" % number, REQUEST))
        self.writer.flush(10.0)

    def delete_before(self, offset: int) -> None:
        target = KafkaPartition(self.broker.physical_name("run-requests"), 0, offset)
        for future in self.broker.admin_client().delete_records([target]).values():
            future.result()
        eventually(lambda: self.broker.offsets("run-requests", 0).start == offset, "the deletion")

    def admit_until(self, commands: int, letters: int) -> None:
        """Have a new admission work until there is so much, and a little longer."""
        admission = Admission(self.broker, self.settings, SchedulerSettings(), 1, "scheduler-0")
        try:

            def is_there() -> bool:
                admission.run_once()
                return self.count("run-commands") >= commands and self.count("dead-letters") >= letters

            eventually(is_there, "commands and letters")
            for _ in range(3):
                admission.run_once()
        finally:
            admission.close()
        assert (self.count("run-commands"), self.count("dead-letters")) == (commands, letters)

    def count(self, topic: str) -> int:
        return self.broker.offsets(topic, 0).end

    def letters(self) -> list[DeadLetter]:
        return [codec.decode(m.value) for m in self.broker.read("dead-letters", 0, 0, self.count("dead-letters"))]


@pytest.mark.feature("O1")
def test_requests_that_were_deleted_unread_become_a_letter(bootstrap: str, topic_prefix: str) -> None:
    inbox = Inbox(bootstrap, topic_prefix)
    counted = metrics.admission_deleted._value.get()
    inbox.ask(3)
    inbox.admit_until(commands=3, letters=0)
    inbox.ask(7)
    inbox.delete_before(8)  # five of them

    inbox.admit_until(commands=5, letters=1)

    (letter,) = inbox.letters()
    assert (letter.topic, letter.partition, letter.offset, letter.code) == ("run-requests", 0, 3, "deleted_unread")
    assert "from offset 3 to 7 (5 at the most)" in letter.reason
    assert metrics.admission_deleted._value.get() - counted == 5
    with pytest.raises(CannotRedriveError, match="only its producer"):
        redrive_record(Stored("run-requests:0:3", 0, letter), 1, new_id=False, again=False)


@pytest.mark.feature("O1")
def test_it_is_said_once_also_if_nothing_is_left(bootstrap: str, topic_prefix: str) -> None:
    inbox = Inbox(bootstrap, topic_prefix)
    inbox.ask(2)
    inbox.admit_until(commands=2, letters=0)
    inbox.ask(2)
    inbox.delete_before(4)

    inbox.admit_until(commands=2, letters=1)
    inbox.admit_until(commands=2, letters=1)
