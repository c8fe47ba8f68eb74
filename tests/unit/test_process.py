"""How a service's process ends."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import pytest

WAIT_S: Final = 60.0
# A thread that nobody ends stands for a client that waits for an answer which never comes.
STUCK: Final = """
import sys, threading
from tidegate.process import run_service
threading.Thread(target=threading.Event().wait).start()
print("said before the end")
sys.exit(run_service(lambda: 1))
"""


@pytest.mark.feature("K2")
def test_a_service_that_failed_ends_whatever_its_clients_wait_for() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 1
    assert done.stdout == "said before the end\n"
