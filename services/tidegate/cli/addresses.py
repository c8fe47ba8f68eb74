"""Where the services of this machine answer: the files that they write into the data folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

DATA_DIR_VARIABLE: Final = "TIDEGATE_DATA_DIR"
DEFAULT_DATA_DIR: Final = ".tidegate/dev"


class AddressError(LookupError):
    """No address is known; the message says why."""


def address_file(name: str) -> Path:
    """Return where a service writes its address, such as `sql.json`."""
    return Path(os.environ.get(DATA_DIR_VARIABLE) or DEFAULT_DATA_DIR) / name


def read_address(file: Path, service: str) -> dict[str, Any]:
    """Return what a service wrote: an object with at least its `url`. Raises AddressError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {**found, "url": str(found["url"])}
    except FileNotFoundError:
        raise AddressError(f"no {service} has run here ({file} does not exist)") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise AddressError(f"{file} cannot be read: {error}") from None
