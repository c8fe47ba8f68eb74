"""How the declared topics are made on this installation's Kafka."""

from __future__ import annotations

import re
from typing import Final

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_QUEUE: Final = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")


class TopicsSettings(BaseSettings):
    """What the files in `schemas/topics` leave open, read from variables such as `TIDEGATE_TOPICS_PARTITIONS_RUN`."""

    model_config = SettingsConfigDict(env_prefix="TIDEGATE_TOPICS_", extra="ignore", frozen=True)

    production: bool = Field(
        default=False,
        description="Ask for replicas, and refuse topics that could lose acknowledged records; else only warn of them.",
    )
    replication_factor: int | None = Field(
        default=None, ge=1, le=100, description="Copies of every partition; 3 in production, else 1, if not set."
    )
    min_insync_replicas: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="Copies that must have a record before it is acknowledged; 2 in production, else 1, if not set.",
    )
    queues: str = Field(
        default="default",
        description="Queues that executors serve, comma-separated: each has a topic step-tasks.QUEUE.",
    )
    partitions_run: int = Field(
        default=8, ge=1, le=10_000, description="Partitions of everything that runs are spread over. Fixed for good."
    )
    partitions_account: int = Field(
        default=4,
        ge=1,
        le=10_000,
        description="Partitions of everything that accounts are spread over. Fixed for good.",
    )
    partitions_inbox: int = Field(default=4, ge=1, le=10_000, description="Partitions of run-requests. Fixed for good.")
    partitions_tasks: int = Field(
        default=4, ge=1, le=10_000, description="Partitions of each step-tasks.QUEUE. Fixed for good."
    )
    partitions_dead: int = Field(default=1, ge=1, le=10_000, description="Partitions of dead-letters. Fixed for good.")
    partitions_table: int = Field(
        default=1, ge=1, le=1, description="Partitions of the global tables: 1, because readers rely on their order."
    )

    @field_validator("queues")
    @classmethod
    def _queues_are_names(cls, text: str) -> str:
        bad = [name for name in text.split(",") if not _QUEUE.fullmatch(name.strip())]
        if bad:
            raise ValueError(f"not names of queues, comma-separated: {', '.join(map(repr, bad))}")
        return text

    def queue_names(self) -> list[str]:
        """Return the queues, without repetitions."""
        return list(dict.fromkeys(name.strip() for name in self.queues.split(",")))

    def partitions(self, group: str) -> int:
        """Return the partition count of a partition group."""
        count: int = getattr(self, f"partitions_{group}")
        return count

    def replicas(self) -> tuple[int, int]:
        """Return the replication factor and the minimum of in-sync replicas. Raises ValueError if they contradict."""
        factor = self.replication_factor or (3 if self.production else 1)
        in_sync = self.min_insync_replicas or (2 if self.production else 1)
        if in_sync > factor:
            raise ValueError(
                f"TIDEGATE_TOPICS_MIN_INSYNC_REPLICAS ({in_sync}) is more than TIDEGATE_TOPICS_REPLICATION_FACTOR "
                f"({factor}): nothing could be written"
            )
        if self.production and in_sync < 2:
            raise ValueError(
                "TIDEGATE_TOPICS_MIN_INSYNC_REPLICAS must be 2 or more in production: with 1, an acknowledged record may "
                "be on one broker alone and is lost with it"
            )
        return factor, in_sync
