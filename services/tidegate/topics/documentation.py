"""The generated page `docs/topics.md`. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from tidegate.topics.declaration import CLEANUP_CONFIG, GROUPS, TopicFile
from tidegate.topics.settings import TopicsSettings

DAY_MS: Final = 24 * 60 * 60 * 1000

_INTRODUCTION: Final = """# Topics

<!-- Written by `tidegate topics docs` from schemas/topics. Changes belong there. -->

All that Tidegate knows is in these topics of Kafka. Each is declared in a file of `schemas/topics/`; `tidegate topics apply`
creates what is missing, `tidegate topics diff` says what differs. Nothing that exists is altered unless the entry is named
(`--alter-config run-events:max.message.bytes`).

A **log** is the truth and is never deleted by time. A **mailbox** keeps its messages long enough to survive the longest
outage. A **table** keeps the last value of each key. All names get the prefix `TIDEGATE_KAFKA_TOPIC_PREFIX`, if one is set.
"""

_GROUPS: Final = """## Partition groups

Topics of one group have the same number of partitions, fixed when they are made: it decides where every run and account
lives. A different number is asked for before the first `tidegate topics apply`.

"""

_REPLICAS: Final = """## Replicas

"""

_SCHEMAS: Final = """## Records

Values are Avro in single-object encoding (`C3 01`, the fingerprint of the schema, the body). Every process puts the schemas
it writes with into the topic `schemas`, so the logs can be read for ever. Example messages are in `schemas/examples/`, the
form of requests in JSON is `schemas/json/run-request.v1.json`. Every record has a header `type`, the record's name, and in
the logs `epoch`, the epoch of its writer: an entry counts only if its epoch is the highest announced before it.
"""


def topics_page(files: Sequence[TopicFile]) -> str:
    """Return the text of docs/topics.md."""
    return "\n".join(
        [
            _INTRODUCTION,
            *_table(
                ("topic", "kind", "key", "partition by", "only writer", "readers", "value", "kept"),
                (
                    (
                        f"`{file.name}`",
                        file.kind,
                        f"`{file.key}`" if ":" in file.key or "_" in file.key or "@" in file.key else file.key,
                        f"{file.partition_by} ({file.partition_group})",
                        ", ".join(file.writers),
                        ", ".join(file.readers),
                        ", ".join(file.value) or "JSON",
                        _kept(file),
                    )
                    for file in files
                ),
            ),
            "",
            *(f"- `{file.name}`: {file.description}" for file in files),
            "",
            _GROUPS + "\n".join(_table(("group", "partitions", "set by", "topics"), _group_rows(files))),
            "",
            _REPLICAS + "\n".join(_table(("variable", "meaning"), _setting_rows())),
            "",
            _SCHEMAS,
        ]
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def _kept(file: TopicFile) -> str:
    if "delete" not in file.config[CLEANUP_CONFIG]:
        return "for ever" if file.kind == "log" else "last per key"
    return f"{int(file.config['retention.ms']) // DAY_MS} days"


def _group_rows(files: Sequence[TopicFile]) -> Iterable[Sequence[str]]:
    for group in GROUPS:
        members = ", ".join(f"`{file.name}`" for file in files if file.partition_group == group)
        default = TopicsSettings.model_fields[f"partitions_{group}"].default
        variable = f"`TIDEGATE_TOPICS_PARTITIONS_{group.upper()}`" if group != "table" else "always 1"
        yield (group, str(default), variable, members)


def _setting_rows() -> Iterable[Sequence[str]]:
    for name in ("production", "replication_factor", "min_insync_replicas", "queues"):
        yield (f"`TIDEGATE_TOPICS_{name.upper()}`", TopicsSettings.model_fields[name].description or "")
