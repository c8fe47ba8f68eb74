"""Settings of the gate, as environment variables `TIDEGATE_GATE_*`."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class GateSettings(BaseSettings):
    """What operators may set."""

    model_config = SettingsConfigDict(env_prefix="TIDEGATE_GATE_", extra="ignore")

    lease_s: float = Field(
        default=10.0,
        gt=0,
        description="An executor that is not heard of for this long has lost its work. Must not be shorter than the executors' "
        "own lease (TIDEGATE_EXECUTOR_LEASE_S).",
    )
