"""The declared topics: the files in `schemas/topics`, checked, and what they mean on one installation. Pure.

Everything else about topics (creation, checks, manifests, docs) follows from what is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from tidegate import codec
from tidegate.topics.settings import TopicsSettings

# Every process reads these files when it starts; the parser in C takes a tenth of the time.
_SafeLoader: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
QUEUE_PLACE: Final = "{queue}"
MIN_INSYNC_CONFIG: Final = "min.insync.replicas"
UNCLEAN_CONFIG: Final = "unclean.leader.election.enable"
CLEANUP_CONFIG: Final = "cleanup.policy"

Kind = Literal["log", "mailbox", "table"]
Group = Literal["run", "account", "inbox", "tasks", "dead", "table"]
GROUPS: Final[tuple[Group, ...]] = ("run", "account", "inbox", "tasks", "dead", "table")
SERVICES: Final = ("scheduler", "gate", "executor", "projection", "gateway")
# Who may write or read. `all`: every service and the command line. `any`: whoever has a part at all. The ACLs follow from it.
Who = Literal["all", "any", "scheduler", "gate", "executor", "projection", "gateway", "cli", "topics", "user"]

# What a file may say. Replicas are left to the settings; everything unknown is more likely a slip than a wish.
CONFIG_KEYS: Final = frozenset(
    {
        CLEANUP_CONFIG,
        "compression.type",
        "delete.retention.ms",
        "max.compaction.lag.ms",
        "max.message.bytes",
        "min.cleanable.dirty.ratio",
        "min.compaction.lag.ms",
        "retention.ms",
        "segment.bytes",
        "segment.ms",
    }
)
_CLEANUP: Final[Mapping[str, frozenset[str]]] = {
    "log": frozenset({"compact"}),
    "table": frozenset({"compact"}),
    "mailbox": frozenset({"compact", "delete"}),
}


class DeclarationError(ValueError):
    """The files in `schemas/topics` are wrong; `problems` lists everything that is, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class TopicFile(BaseModel):
    """A file of `schemas/topics`, as written."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,80}(\.\{queue\})?$")
    description: str = Field(min_length=1)
    key: str = Field(min_length=1)
    partition_by: str = Field(min_length=1)
    partition_group: Group
    writers: list[Who] = Field(min_length=1)
    readers: list[Who] = Field(min_length=1)
    value: list[str]
    kind: Kind
    config: dict[str, Annotated[str, Field(min_length=1)]]

    @property
    def is_template(self) -> bool:
        """Whether there is one such topic per queue."""
        return QUEUE_PLACE in self.name


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as it must be on this installation. `config` holds everything that is asked for, replicas' rules included."""

    name: str
    partition_count: int
    replication_factor: int
    config: Mapping[str, str]
    file: TopicFile


def read_topic_files(directory: Path | None = None) -> list[TopicFile]:
    """Return the files of a directory (of the installed package by default), sorted by name.

    Raises DeclarationError with all problems of all files.
    """
    directory = directory or codec.schemas_dir() / "topics"
    files: list[TopicFile] = []
    problems: list[str] = []
    for path in sorted(directory.glob("*.yaml")):
        try:
            document = yaml.load(path.read_text(encoding="utf-8"), Loader=_SafeLoader)  # noqa: S506 - it is safe
            file = TopicFile.model_validate(document)
        except yaml.YAMLError as error:
            problems.append(f"{path.name}: not YAML: {' '.join(str(error).split())}")
        except pydantic.ValidationError as error:
            problems += [
                f"{path.name}: {'.'.join(map(str, problem['loc'])) or 'file'}: {problem['msg']}"
                for problem in error.errors()
            ]
        else:
            files.append(file)
            problems += [f"{path.name}: {problem}" for problem in _contradictions(path, file)]
    if not files and not problems:
        problems = [f"no topics are declared in {directory}"]
    if problems:
        raise DeclarationError(problems)
    return files


def _contradictions(path: Path, file: TopicFile) -> Iterable[str]:
    """Yield what is wrong with a file although each of its lines is fine."""
    expected = file.name.partition(".")[0]
    if path.stem != expected:
        yield f"declares {file.name!r}, so the file must be named {expected}.yaml"
    if file.is_template != (file.partition_group == "tasks"):
        yield f"only the topics of the group tasks, and all of them, have {QUEUE_PLACE} in their name"
    if file.partition_group == "table" and file.kind != "table":
        yield "the partition group table is for global tables (kind: table)"
    for unknown in sorted(file.config.keys() - CONFIG_KEYS):
        yield f"config: {unknown} is not one that may be declared; known are {', '.join(sorted(CONFIG_KEYS))}"
    yield from _cleanup_problems(file)
    records = {path.stem.partition(".")[0] for path in (codec.schemas_dir() / "avro").glob("*.avsc")}
    for unknown in [name for name in file.value if name not in records]:
        yield f"value: there is no schema of a record named {unknown}"


def _cleanup_problems(file: TopicFile) -> Iterable[str]:
    cleanup = file.config.get(CLEANUP_CONFIG, "")
    wanted = _CLEANUP[file.kind]
    if policies(cleanup) != wanted:
        yield f"config: {CLEANUP_CONFIG} of a {file.kind} must be {','.join(sorted(wanted))}, not {cleanup!r}"
    if file.kind == "mailbox":
        retention, lag = file.config.get("retention.ms", ""), file.config.get("min.compaction.lag.ms", "")
        if not (retention.isdigit() and lag.isdigit()) or int(lag) < int(retention):
            yield (
                "config: a mailbox needs retention.ms, and a min.compaction.lag.ms that is not shorter: "
                "a request must not vanish because of another with its key"
            )
    elif "retention.ms" in file.config:
        yield f"config: a {file.kind} is never deleted by time, so it cannot have retention.ms"


def policies(cleanup: str) -> frozenset[str]:
    """Return the words of a `cleanup.policy`, whose order means nothing."""
    return frozenset(word.strip() for word in cleanup.split(",") if word.strip())


def load_topics(
    queues: Iterable[str] | None = None,
    settings: TopicsSettings | None = None,
    files: Sequence[TopicFile] | None = None,
) -> list[Topic]:
    """Return the topics of this installation, sorted by name; `step-tasks.{queue}` once for each queue.

    By default queues are those of the settings, settings come from the environment, and files from the package.
    Raises DeclarationError, and ValueError for settings that contradict each other.
    """
    settings = settings or TopicsSettings()
    names = list(dict.fromkeys(queues)) if queues is not None else settings.queue_names()
    made = [
        _topic(file, name, settings)
        for file in (read_topic_files() if files is None else files)
        for name in ([file.name.replace(QUEUE_PLACE, queue) for queue in names] if file.is_template else [file.name])
    ]
    return sorted(made, key=lambda topic: topic.name)


def _topic(file: TopicFile, name: str, settings: TopicsSettings) -> Topic:
    factor, in_sync = settings.replicas()
    return Topic(
        name=name,
        partition_count=settings.partitions(file.partition_group),
        replication_factor=factor,
        config={**file.config, MIN_INSYNC_CONFIG: str(in_sync), UNCLEAN_CONFIG: "false"},
        file=file,
    )
