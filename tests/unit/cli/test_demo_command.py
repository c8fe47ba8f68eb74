"""`tidegate demo` says no when something does not hold.

What it shows when all does: tests/integration/test_one_command.py and tests/chaos.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tidegate.cli import demo
from tidegate.demo.refund import DemoError
from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.stack import StackError

PROOF = {
    "ok": False,
    "run_id": "r",
    "refund_dispatches": 2,
    "refund_effects": 2,
    "chain_verified": True,
    "reserved_micros": 1,
    "settled_micros": 1,
    "seconds": 1.0,
}


class _Stack:
    """What the command needs of a stack, started by nobody."""

    settings = None

    def __init__(self, failure: Exception | None = None) -> None:
        self._failure = failure

    def __enter__(self) -> _Stack:
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        pass


def run_refund(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: Exception | None, proof: Any) -> Any:
    class Demo:
        def __init__(self, *_: object) -> None:
            pass

        def run(self) -> dict[str, Any]:
            if isinstance(proof, Exception):
                raise proof
            return dict(proof)

    monkeypatch.setattr(demo, "make_stack", lambda *_: _Stack(failure))
    monkeypatch.setattr(demo, "RefundDemo", Demo)
    monkeypatch.setattr(demo, "_show_plain_producer", lambda *_: None)
    monkeypatch.setattr(demo.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    return CliRunner().invoke(demo.app, ["--json"])


def test_a_proof_that_fails_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run_refund(monkeypatch, tmp_path, None, PROOF)
    assert result.exit_code == 1
    assert json.loads(result.stdout) == PROOF
    assert tmp_path.exists()  # for whoever wants to know why


@pytest.mark.parametrize("where", ["in the stack", "in the demo"])
def test_what_cannot_be_shown_is_a_failure_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    failure = StackError("no room") if where == "in the stack" else None
    result = run_refund(monkeypatch, tmp_path, failure, DemoError("no room"))
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"ok": False, "error": "no room"}
    assert "no room" in result.stderr


# --- storms ---------------------------------------------------------------

SUMMARY: dict[str, Any] = {
    "ok": True,
    "seed": 4,
    "runs": 100,
    "ended": {"succeeded": 99, "cancelled": 1},
    "breaches": {"lost runs": [], "wrong money": []},
    "done": {"kill -9": {"gate": 2, "scheduler": 1}},
    "restarts": 3,
    "attempts": 500,
    "attempts_lost": 4,
    "attempts_failed": 5,
    "late_results": 6,
    "payments": 200,
    "events": 2_000,
    "void_entries": 7,
    "settled_micros": 8,
    "seconds": 9.0,
}


def run_chaos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outcome: Any, *words: str) -> tuple[Any, Any]:
    """Run the command with a storm that ends like this; returns what came of it, and the arguments of the storm."""
    seen: list[Any] = []

    class Chaos:
        def __init__(self, stack: Any, size: Any, seed: int, screen: Any) -> None:
            seen.append((size, seed))
            screen.show(0, {"running": 3})

        def run(self) -> dict[str, Any]:
            if isinstance(outcome, Exception):
                raise outcome
            return {**outcome, "seed": seen[0][1]}

    monkeypatch.setattr(demo, "make_chaos_stack", lambda *_: _Stack())
    monkeypatch.setattr(demo, "ChaosDemo", Chaos)
    monkeypatch.setattr(demo.tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))
    (tmp_path / f"tidegate-{words[0]}-").mkdir()
    return CliRunner().invoke(demo.app, list(words)), seen[0]


def test_a_storm_that_nothing_came_of_is_a_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, (size, seed) = run_chaos(
        monkeypatch, tmp_path, SUMMARY, "chaos-500", "--json", "--seed", "4", "--blows", "7"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {**SUMMARY, "seed": 4}
    assert (size.runs, size.seconds, size.blows, seed) == (500, demo.SIZES["chaos-500"].seconds, 7, 4)
    assert not list(tmp_path.iterdir()), "the data of a storm that nothing came of is of no use"


def test_a_breach_is_a_failure_and_says_how_to_see_it_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lost = {**SUMMARY, "ok": False, "breaches": {"lost runs": [f"order-{n}: [still] running" for n in range(12)]}}
    result, (_, seed) = run_chaos(monkeypatch, tmp_path, lost, "chaos-100")
    assert result.exit_code == 1
    assert "order-9: [still] running" in result.stdout
    assert "and 2 more" in result.stdout
    assert f"tidegate demo chaos-100 --seed {seed} --seconds 45 --blows 26" in result.stdout
    assert "It does NOT hold." in result.stdout
    assert str(tmp_path / "tidegate-chaos-100-") in result.stdout
    assert (tmp_path / "tidegate-chaos-100-").exists()


def test_a_storm_that_could_not_be_carried_out_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, (_, seed) = run_chaos(monkeypatch, tmp_path, EmbeddedKafkaError("no port"), "chaos-100", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"ok": False, "seed": seed, "error": "no port"}
    assert f"--seed {seed}" in result.stderr


def test_without_a_command_it_is_the_refund(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[bool] = []
    monkeypatch.setattr(demo, "make_stack", lambda *_: called.append(True) or _Stack(StackError("enough")))
    monkeypatch.setattr(demo.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    for words in ([], ["--keep"], ["refund"]):
        assert CliRunner().invoke(demo.app, words).exit_code == 1
    assert len(called) == 3
    text = CliRunner().invoke(demo.app, ["--help"]).stdout
    assert all(name in text for name in ("refund", "chaos-100", "chaos-500"))
