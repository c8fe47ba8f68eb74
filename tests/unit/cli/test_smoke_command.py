"""`tidegate smoke`: what it says before it begins. A real run: `tests/integration/test_runbooks.py`."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from typer.testing import CliRunner

from tidegate.cli import smoke
from tidegate.demo import smoke as functions
from tidegate.eventlog.memory import MemoryBroker
from tidegate.sdk.client import Client


def test_a_queue_without_a_topic_is_said_at_once_and_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = MemoryBroker()
    broker.create_topic("workflows", 1)
    monkeypatch.setattr(smoke, "KafkaBroker", lambda _: broker)
    done = CliRunner().invoke(smoke.app, ["--queue", "gpu"])
    assert done.exit_code == 1
    assert "there is no topic step-tasks.gpu" in done.output
    assert "`tidegate topics apply --queue gpu`" in done.output
    assert broker.offsets("workflows", 0).end == 0


def test_each_queue_has_a_version_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else who tries another queue is told that the workflow is there with other content."""
    broker = MemoryBroker()
    broker.create_topic("workflows", 1)
    published: list[Any] = []
    with Client(broker) as client:
        for queue in ("smoke", "default", "smoke"):
            monkeypatch.setenv("TIDEGATE_SMOKE_QUEUE", queue)
            published += client.publish(importlib.reload(functions).app)
    assert published == ["tidegate-smoke@smoke", "tidegate-smoke@default", "tidegate-smoke@smoke"]
