"""Settings of an executor, from variables such as `TIDEGATE_EXECUTOR_SLOTS`."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from tidegate.domain.identity import NAME_PATTERN
from tidegate.registry.registration import DEFAULT_HEARTBEAT_S, DEFAULT_LEASE_S

MAX_OUTPUT_BYTES = 8 * 1024 * 1024


class ExecutorSettings(BaseSettings):
    """How an executor runs. Times in seconds."""

    model_config = SettingsConfigDict(env_prefix="TIDEGATE_EXECUTOR_", extra="ignore", frozen=True)

    queue: str = Field(default="default", pattern=NAME_PATTERN, description="The queue whose work it takes.")
    slots: int = Field(default=8, ge=1, le=1000, description="How many attempts it runs at the same time.")
    heartbeat_s: float = Field(default=DEFAULT_HEARTBEAT_S, gt=0, description="Time between two heartbeats.")
    lease_s: float = Field(
        default=DEFAULT_LEASE_S,
        gt=0,
        description="Without an acknowledged heartbeat for so long it stops everything and ends. Never longer than what "
        "the gate waits before it gives the work to others.",
    )
    drain_s: float = Field(
        default=25.0, ge=0, description="How long what runs may take to end after SIGTERM; then it is aborted."
    )
    output_max_bytes: int = Field(
        default=512 * 1024, ge=1, le=MAX_OUTPUT_BYTES, description="Largest output of a function, as JSON in UTF-8."
    )
    hang_grace_s: float = Field(
        default=10.0,
        gt=0,
        description="A function that blocks the event loop for so long beyond its deadline ends the process.",
    )
