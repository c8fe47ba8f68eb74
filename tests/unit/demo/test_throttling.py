"""The parts of the throttling demo that decide what it says."""

from __future__ import annotations

import os
import pty
import sys
from collections import Counter
from pathlib import Path

import pytest

from tidegate.cli.keys import Keys
from tidegate.demo.throttling.app import Call, most_at_once
from tidegate.demo.throttling.demo import SHARES, shares_halfway, wanted


def test_overlap_is_counted_at_the_worst_instant() -> None:
    calls = [Call(0, 10, "a"), Call(5, 15, "b"), Call(10, 20, "c"), Call(12, 13, "d")]
    assert most_at_once(calls) == 3
    assert most_at_once(calls[:1]) == 1
    assert most_at_once([]) == 0


@pytest.mark.parametrize("runs", [20, 100, 1000])
def test_every_account_gets_its_part_and_the_largest_asks_first(runs: int) -> None:
    runs_of = Counter(account for _, account in wanted(runs))
    assert set(runs_of) == set(SHARES)
    assert abs(sum(runs_of.values()) - runs) <= len(SHARES)
    assert wanted(runs)[0][1] == max(SHARES, key=lambda account: SHARES[account])
    assert len({run_id for run_id, _ in wanted(runs)}) == len(wanted(runs))


def test_shares_are_those_of_the_first_half() -> None:
    calls = [Call(number, number + 1, f"r{number}") for number in range(4)]
    assert shares_halfway(calls, {"r0": "x", "r1": "y", "r2": "x", "r3": "x"}) == {"x": 1, "y": 1}


def test_keys_are_read_without_waiting_and_the_terminal_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        with Keys() as keys:
            assert (keys.are_there, keys.pressed()) == (True, "")
            os.write(master, b"pc")
            assert keys.pressed() == "pc"
    os.close(master)


def test_without_a_terminal_no_key_is_ever_pressed(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with Keys() as keys:
            assert (keys.are_there, keys.pressed()) == (False, "")
