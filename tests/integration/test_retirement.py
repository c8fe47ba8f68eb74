"""The ledger retired on a real broker: a gate that is killed in the middle goes on, and the money that was counted stays."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.arming import Arming
from support.stack import WholeStack, assert_whole, eventually

pytestmark = pytest.mark.timeout(240)
GATE = "gate-0"
ENV = {"TIDEGATE_CHECKPOINT_EVERY_ENTRIES": "5", "TIDEGATE_CHECKPOINT_EVERY_S": "0.3"}
BUDGET = """
kind: budget
budget: all
version: "1"
account: "*"
window: month
limits: {calls: 1000}
"""


def partitions(whole: WholeStack) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(whole.cli("ledger", "show", "--json"))["partitions"]
    return found


def is_retired(whole: WholeStack) -> bool:
    begun = [part for part in partitions(whole) if part["entries"]]
    return bool(begun) and all(part["retired"] and not part["older"] for part in begun)


def counted(whole: WholeStack) -> dict[str, Any]:
    rows = json.loads(whole.cli("budget", "show", "all", "--json"))
    return {row["account"]: row["meters"] for row in rows}


@pytest.mark.feature("L1", "P2")
def test_a_gate_killed_while_it_retires_goes_on_and_keeps_the_balances(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("retirement")
    arming = Arming(folder / "armed", (GATE,))
    with WholeStack(folder / "stack", env=ENV, process_env=arming.process_env) as whole:
        file = folder / "budget.yaml"
        file.write_text(BUDGET, encoding="utf-8")
        whole.cli("policy", "apply", str(file))
        for number in range(4):
            whole.wait(whole.client.start("chain", 1, run_id=f"before-{number}", account="acme/a"))
        before = eventually(lambda: _settled(counted(whole)), "everything settled")
        arming.now(whole, GATE, "retention.before-tombstone=kill@3")
        whole.cli("ledger", "retire", "--keep-days", "0", "--every-hours", "0.001")
        whole.expect_other_pid(GATE)
        eventually(lambda: is_retired(whole), "the ledger to be retired")
        assert counted(whole) == before
        whole.kill(GATE)
        whole.wait(whole.client.start("chain", 1, run_id="after", account="acme/a"))
        after = eventually(lambda: _settled(counted(whole)), "everything settled")
        assert after["acme"]["calls"]["spent"] > before["acme"]["calls"]["spent"]
        whole.cli("audit", "money")
        whole.cli("verify")
        assert_whole(whole)


def _settled(meters: dict[str, Any]) -> dict[str, Any] | None:
    open_ = any(meter["reserved"] for account in meters.values() for meter in account.values())
    return None if open_ or not meters else meters
