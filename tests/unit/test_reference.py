"""The generated references are up to date, and nothing that the code reads is missing from them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tidegate import reference
from tidegate.executor.settings import ExecutorSettings
from tidegate.gate.settings import GateSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.feature("K4")
@pytest.mark.parametrize(
    "path", [Path("docs/configuration.md"), Path("docs/metrics.md"), Path(".env.example")], ids=str
)
def test_generated_pages_are_up_to_date(path: Path) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == reference.pages()[ROOT / path], "run `make docs`"


@pytest.mark.feature("K4")
def test_every_variable_that_the_code_names_is_in_the_reference() -> None:
    known = {setting.variable for group in reference.groups() for setting in group.settings}
    known |= reference.OTHER_VARIABLES.keys() | reference.NOT_SETTINGS
    named = set()
    for path in sorted((ROOT / "services/tidegate").rglob("*.py")):
        named |= set(
            re.findall(r"TIDEGATE_[A-Z0-9]+(?:_[A-Z0-9]+)*(?![A-Z0-9_]*[_*])", path.read_text(encoding="utf-8"))
        )
    assert named - known == set()


@pytest.mark.feature("K4")
def test_every_setting_says_what_it_means() -> None:
    assert [s.variable for group in reference.groups() for s in group.settings if not s.text] == []


@pytest.mark.feature("K4")
def test_the_documented_defaults_are_what_was_promised() -> None:
    assert (ExecutorSettings().heartbeat_s, ExecutorSettings().lease_s) == (1.0, 10.0)
    assert GateSettings().lease_s >= ExecutorSettings().lease_s


@pytest.mark.feature("K4")
@pytest.mark.parametrize(
    ("command", "variable", "value"),
    [
        (["tidegate.cli.__main__", "verify"], "TIDEGATE_KAFKA_SESSION_TIMEOUT_MS", "soon"),
        (["tidegate.cli.__main__", "topics", "list"], "TIDEGATE_TOPICS_PARTITIONS_RUN", "-1"),
        (["tidegate.cli.__main__", "dev"], "TIDEGATE_TOPICS_PARTITIONS_RUN", "-1"),
        (["tidegate.gate"], "TIDEGATE_GATE_LEASE_S", "0"),
        (["tidegate.scheduler"], "TIDEGATE_HTTP_PORT", "99999"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_setting_that_makes_no_sense_is_a_line_and_no_traceback(
    command: list[str], variable: str, value: str, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        variable: value,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TIDEGATE_BROKER_WAIT_S": "0.1",
    }
    environment["TIDEGATE_DATA_DIR"] = str(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert variable in ended.stderr
    assert "Traceback" not in ended.stderr
