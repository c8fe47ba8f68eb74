"""Settings of an executor, from variables such as `TIDEGATE_EXECUTOR_SLOTS`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
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
    code_version: str = Field(
        default="",
        max_length=128,
        description="What the log calls the code of its functions: a commit, or the image's tag. Empty: of each function the "
        "first digits of the SHA-256 of the file that it is in.",
    )
    hang_grace_s: float = Field(
        default=10.0,
        gt=0,
        description="A function that blocks the event loop for so long beyond its deadline ends the process.",
    )
    process_start_s: float = Field(
        default=30.0,
        gt=0,
        description="Isolation `subprocess`: how long the process may take until the function can be entered.",
    )
    job_namespace: str = Field(
        default="", description="Isolation `job`: where Jobs are made. Empty: this executor runs no functions as Jobs."
    )
    job_image: str = Field(default="", description="The image of Jobs of functions that name none; it holds the app.")
    job_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="When the image of a Job is pulled."
    )
    job_start_s: float = Field(
        default=120.0,
        gt=0,
        description="How long a Job may take until its function is entered: for a node, the image, and the app to load.",
    )
    job_memory_mib: int = Field(default=512, ge=64, description="Memory of Jobs of functions that name none.")
    job_cpu_millis: int = Field(
        default=250, ge=1, description="Thousandths of a processor that Jobs ask for, if their functions do not say."
    )
    job_env: dict[str, str] = Field(default={}, description='Variables of Jobs, as JSON: `{"NAME": "value"}`.')
    job_env_secrets: tuple[str, ...] = Field(
        default=(), description="Secrets of that namespace whose keys become variables of Jobs, as a JSON array."
    )
    job_pod: dict[str, Any] = Field(
        default={},
        description='More of the specification of the pods of Jobs, as JSON: `{"nodeSelector": {"pool": "tools"}}`.',
    )

    @model_validator(mode="after")
    def _jobs_have_an_image(self) -> ExecutorSettings:
        if self.job_namespace and not self.job_image:
            raise ValueError("TIDEGATE_EXECUTOR_JOB_IMAGE is missing: functions that name no image need it")
        if taken := {"containers", "volumes"} & self.job_pod.keys():
            raise ValueError(f"TIDEGATE_EXECUTOR_JOB_POD must not set {', '.join(sorted(taken))}: these are ours")
        return self
