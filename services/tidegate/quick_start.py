"""Imported before everything else by services that others wait for while they start: importing is most of a restart.

A fifth of the processor time of their imports goes without three things that these services have no use for: the garbage
collector, which looks through what has just been imported again and again (`process.spare_the_collector` switches it on);
pydantic's search of every installed distribution for plug-ins; and rich, which structlog would load for coloured consoles.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import Any, cast

_HIDDEN = "rich"

gc.disable()
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
if _HIDDEN not in sys.modules:
    cast("dict[str, Any]", sys.modules)[_HIDDEN] = None  # as if it were not installed
    importlib.import_module("structlog")
    del sys.modules[_HIDDEN]
