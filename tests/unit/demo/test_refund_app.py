"""The demo's app, which is the first that an operator runs, in a cluster or with Docker Compose."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.demo.app import app
from tidegate.demo.payments import Payments
from tidegate.testing import Rehearsal


@pytest.mark.feature("K3")
def test_it_refunds_where_nothing_was_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod's or container's data folder is not there before somebody makes it."""
    folder = tmp_path / "not" / "there"
    monkeypatch.setenv("TIDEGATE_DATA_DIR", str(folder))
    with Rehearsal(app) as rehearsal:
        outcome = rehearsal.run("agent:support", {"order_id": "order-1"})
    assert outcome.status == "succeeded"
    assert Payments(folder / "payments.sqlite").refunds("order-1") == 1
