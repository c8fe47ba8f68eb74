"""All dashboards."""

from __future__ import annotations

from typing import Final

from tidegate.projection.dashboards.approvals import APPROVALS
from tidegate.projection.dashboards.executors import EXECUTORS
from tidegate.projection.dashboards.one_run import ONE_RUN
from tidegate.projection.dashboards.operations import OPERATIONS
from tidegate.projection.dashboards.spend import SPEND

BOARDS: Final = (OPERATIONS, SPEND, APPROVALS, EXECUTORS, ONE_RUN)
