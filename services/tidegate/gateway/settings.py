"""Settings of the gateway, each an environment variable."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

ADDRESS_FILE: Final = "gateway.json"
_EVERYWHERE: Final = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - compared with, not bound to


class GatewaySettings(BaseSettings):
    """Where the gateway answers and what it keeps, from variables such as `TIDEGATE_GATEWAY_PORT`."""

    model_config = SettingsConfigDict(env_prefix="TIDEGATE_", extra="ignore", frozen=True)

    data_dir: Path = Field(default=Path(".tidegate/dev"), description="Folder of everything that this machine keeps.")
    gateway_host: str = Field(default="127.0.0.1", description="Address that the gateway listens on.")
    gateway_port: int = Field(
        default=8080, ge=0, le=65535, description="Port of the gateway; 0 for a free one. See `gateway.json`."
    )
    gateway_advertised_host: str = Field(
        default="",
        description="Under which name other gateways reach this one; by default the address it listens on, or this host's "
        "name if it listens everywhere.",
    )
    gateway_keep_h: int = Field(
        default=24,
        ge=1,
        le=24 * 31,
        description="How long finished runs and windows of spend stay in the live view. The log keeps them for ever.",
    )

    @property
    def advertised_host(self) -> str:
        """Return the host part of the address that others are told."""
        if self.gateway_advertised_host:
            return self.gateway_advertised_host
        return socket.gethostname() if self.gateway_host in _EVERYWHERE else self.gateway_host

    @property
    def address_file(self) -> Path:
        """Where the address is written."""
        return self.data_dir / ADDRESS_FILE
