"""What services leave out to start sooner changes nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LOOK = """
import gc, json, sys
import tidegate.{service}.__main__
left_out = gc.isenabled(), "rich" in sys.modules
from tidegate.process import configure_logging, spare_the_collector
spare_the_collector()
import rich.console
configure_logging("{service}", "{service}-0", "info")
import structlog
try:
    raise ValueError("broken")
except ValueError:
    structlog.get_logger().exception("failed")
print(json.dumps([*left_out, gc.isenabled()]))
"""


@pytest.mark.parametrize("service", ["scheduler", "gate"])
def test_nothing_is_imported_that_a_start_does_not_need_and_logs_are_as_ever(service: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOOK.format(service=service)], capture_output=True, text=True, check=True
    )

    collects, has_rich, collects_at_work = json.loads(done.stdout)
    assert (collects, has_rich, collects_at_work) == (False, False, True)
    line = json.loads(done.stderr)
    assert (line["event"], line["exception"][0]["exc_value"]) == ("failed", "broken")
    assert not any(frame.get("locals") for frame in line["exception"][0]["frames"])
