"""Settings of the scheduler, as environment variables `TIDEGATE_SCHEDULER_*`."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class SchedulerSettings(BaseSettings):
    """What operators may set."""

    model_config = SettingsConfigDict(env_prefix="TIDEGATE_SCHEDULER_", extra="ignore")

    max_request_bytes: int = Field(
        default=1024 * 1024, ge=1024, description="Larger requests are refused into the dead letters."
    )
    request_horizon_s: float = Field(
        default=7 * 24 * 3600.0,
        gt=0,
        description="Older requests are refused, so that resetting the admission group re-runs nothing.",
    )
