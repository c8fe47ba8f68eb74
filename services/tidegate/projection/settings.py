"""Settings of the projection, each an environment variable."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

SQL_ADDRESS_FILE: Final = "sql.json"
CONTROL_ADDRESS_FILE: Final = "projection.json"


class ProjectionSettings(BaseSettings):
    """Where ClickHouse is and how the projection fills it, from variables such as `TIDEGATE_CLICKHOUSE_URL`."""

    model_config = SettingsConfigDict(env_prefix="TIDEGATE_", extra="ignore", frozen=True)

    data_dir: Path = Field(default=Path(".tidegate/dev"), description="Folder of everything that this machine keeps.")
    clickhouse_url: str = Field(
        default="",
        pattern=r"^(|chdb:///.+|https?://.+)$",
        description="`http(s)://HOST:PORT` of a ClickHouse server, or `chdb:///FOLDER` for the embedded one (the default, "
        "in the data folder).",
    )
    clickhouse_user: str = Field(default="default", description="User at the ClickHouse server.")
    clickhouse_password: SecretStr = Field(default=SecretStr(""), description="Password at the ClickHouse server.")
    clickhouse_database: str = Field(
        default="tidegate", pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$", description="Database of the tables and views."
    )
    projection_group: str = Field(
        default="tidegate-projection", description="Consumer group. Its committed offsets decide where reading starts."
    )
    projection_flush_ms: int = Field(
        default=200, ge=10, le=60_000, description="How long a row may wait for others before it is inserted."
    )
    projection_batch_rows: int = Field(
        default=80_000,
        ge=1,
        le=1_000_000,
        description="Rows that are inserted together at most, give or take one poll.",
    )
    projection_batch_bytes: int = Field(
        default=64 * 1024 * 1024, ge=1, description="Bytes of records whose rows are inserted together at most."
    )
    projection_ttl_days: int = Field(
        default=0,
        ge=0,
        le=36_500,
        description="After how many days ClickHouse may forget runs, decisions and money; 0: never. The logs have retention of "
        "their own, and a rebuild brings back what they still hold.",
    )
    projection_sql_host: str = Field(
        default="127.0.0.1", description="Where read-only SQL is served when ClickHouse is embedded."
    )
    projection_sql_port: int = Field(
        default=8123, ge=0, le=65535, description="Port of the read-only SQL; 0 for a free one. See `sql.json`."
    )
    projection_sql_timeout_s: float = Field(
        default=30.0, gt=0, description="How long a query over the read-only SQL may take."
    )
    projection_sql_memory_mb: int = Field(
        default=512, ge=16, description="How much memory such a query may use, in MiB."
    )

    @property
    def effective_url(self) -> str:
        """The address of ClickHouse, with the default filled in."""
        return self.clickhouse_url or f"chdb://{(self.data_dir / 'clickhouse').absolute()}"

    @property
    def embedded_path(self) -> Path | None:
        """The folder of the embedded ClickHouse; None if a server is used."""
        scheme, _, rest = self.effective_url.partition("://")
        return Path(rest).resolve() if scheme == "chdb" else None

    @property
    def control_address_file(self) -> Path:
        """Where it is written how to ask for a replay."""
        return self.data_dir / CONTROL_ADDRESS_FILE

    @property
    def sql_address_file(self) -> Path:
        """Where the address of the read-only SQL is written."""
        return self.data_dir / SQL_ADDRESS_FILE
