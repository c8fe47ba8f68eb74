"""What earlier incarnations of an instance id left in `instances`, and which of them are proven dead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import structlog

from tidegate import codec
from tidegate.domain.messages import EndedIncarnation, Instance
from tidegate.eventlog.interface import Message
from tidegate.registry.process import Judgement, ProcessIdentity, Verdict, judge

INCARNATION_HEADER: Final = "incarnation"
NOT_YET_KNOWN: Final = -1  # the incarnation in a registration, whose own offset it is
GONE: Final = "gone"
MAX_ENDED: Final = 64

_log = structlog.get_logger()


class Predecessors(NamedTuple):
    """`ended`: incarnations proven dead, with the evidence. `alive`: evidence of one that runs now, else empty."""

    ended: tuple[EndedIncarnation, ...]
    alive: str


def last_records(messages: Iterable[Message], instance_id: str) -> dict[int, Instance]:
    """Return the last record of each incarnation of `instance_id` among the messages, oldest incarnation first.

    Only those are decoded: the heartbeats in between may be many. A record that cannot be decoded is skipped.
    """
    key, latest = instance_id.encode(), {}
    for message in messages:
        if message.key == key and message.value is not None:
            latest[_incarnation_of(message)] = message.value
    found = {}
    for incarnation, value in sorted(latest.items()):
        try:
            record = codec.decode(value)
        except codec.DecodeError as error:
            _log.error("registration skipped", instance_id=instance_id, incarnation=incarnation, error=str(error))
            continue
        if isinstance(record, Instance):
            found[incarnation] = record
    return found


def _incarnation_of(message: Message) -> int:
    stated = dict(message.headers).get(INCARNATION_HEADER)
    incarnation = codec.decode(message.value).incarnation if stated is None else int(stated)
    return message.offset if incarnation == NOT_YET_KNOWN else incarnation


def examine(
    records: dict[int, Instance],
    me: ProcessIdentity,
    judge_one: Callable[[Instance, ProcessIdentity], Judgement] = judge,
) -> Predecessors:
    """Judge every earlier incarnation that did not say farewell. Reads the process table."""
    ended, alive = [], ""
    for incarnation, record in records.items():
        if record.state == GONE:
            continue
        verdict, evidence = judge_one(record, me)
        if verdict is Verdict.DEAD:
            ended.append(EndedIncarnation(incarnation=incarnation, evidence=evidence))
        elif verdict is Verdict.ALIVE:
            alive = evidence
        else:
            _log.info("older incarnation keeps its lease", incarnation=incarnation, why=evidence)
    return Predecessors(tuple(ended[-MAX_ENDED:]), alive)
